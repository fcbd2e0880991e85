"""One client's rotation towards a reference."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedrot_kernels import Rotations, find_rotations
from fedrot_kernels.checks import find_zeros

from ..adapters.layout import Adapter, AdapterGroup, as_matrix
from ..adapters.update import StateDict, Update
from ..errors import UpdateError
from ..options import AlignOn, Factor
from ..ranks.padding import rank_mask

# ‖RᵀR − I‖_max up to which R counts as a rotation; iterations that converge end a hundred times below.
LARGEST_RESIDUAL = 1e-4


def aligned_factors(align_on: AlignOn, round: int) -> tuple[Factor, ...]:
    """The factors that are aligned in the round of this index; the paper alternates, beginning with B."""
    if align_on == "A" or align_on == "B":
        return (align_on,)
    if align_on == "alternate":
        return ("A",) if round % 2 else ("B",)
    return ("A", "B")


def rotations(
    group: AdapterGroup, client: Update, reference: StateDict, on: tuple[Factor, ...], strength: float, *, reflections: bool
) -> Rotations:
    """The rotations R (G, r, r) of one client's adapters of a group, softened by λ.

    The cross-covariance M is A A_refᵀ, BᵀB_ref or, aligned on both, A A_refᵀ/‖A_ref‖² + BᵀB_ref/‖B_ref‖². Adapters that
    are untrained in the reference do not rotate; see ``trained_references``.

    Raises:
        UpdateError: the products of the client's factors overflow.
    """
    A_ref, B_ref = trained_references(group.adapters, reference, on)
    rows = None
    if client.ranks is not None:
        rows = torch.stack([rank_mask(a, [client])[0] for a in group.adapters]).to(client.device)
    found = find_rotations(
        group.all_A(client),
        group.all_B(client),
        A_ref=A_ref if "A" in on else None,
        B_ref=B_ref if "B" in on else None,
        strength=strength,
        reflections=reflections,
        rank_mask=rows,
    )
    check_rotations(found.residual[:, None], group.adapters, [client.name])
    return found


def trained_references(
    adapters: Sequence[Adapter], reference: StateDict, on: tuple[Factor, ...] | str
) -> tuple[list[Tensor], list[Tensor]]:
    """A_ref (r, d_in) and B_ref (d_out, r) of every adapter, as matrices; both zero where the reference is untrained.

    An adapter is untrained if one of its factors is zero, as B is in PEFT's start, and A in that of an embedding. Its other
    factor is only where training began: it tells nothing of the basis of the clients' updates, so towards it nothing
    rotates. In FedRot-LoRA's paper the first round is not aligned for that reason.

    Args:
        adapters: the adapters.
        reference: the reference.
        on: the factors that are aligned. One that is zero rotates nothing anyway, so only the other one is looked at.
    """
    A_ref = [as_matrix(reference[a.key_A]) for a in adapters]
    B_ref = [as_matrix(reference[a.key_B]) for a in adapters]
    for factors in [A_ref] * ("B" in on) + [B_ref] * ("A" in on):
        for i in find_zeros(factors):
            A_ref[i], B_ref[i] = torch.zeros_like(A_ref[i]), torch.zeros_like(B_ref[i])
    return A_ref, B_ref


def check_rotations(residual: Tensor, adapters: Sequence[Adapter], clients: Sequence[str]) -> None:
    """Raise UpdateError unless every matrix is a rotation, by the residuals ‖RᵀR − I‖_max, (L, N)."""
    wrong = ~(residual <= LARGEST_RESIDUAL)
    if bool(wrong.any()):
        client, adapter = (int(index[0]) for index in wrong.T.nonzero(as_tuple=True))
        where, far = f"{clients[client]}, {adapters[adapter].module}", float(residual[adapter, client])
        if math.isfinite(far):
            raise UpdateError(f"{where}: its rotation did not converge, ‖RᵀR − I‖_max is {far:.1e}; leave this client out")
        raise UpdateError(f"{where}: the products of its factors overflow; send float64, or scale them")
