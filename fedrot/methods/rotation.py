"""One client's rotation towards a reference."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedrot_kernels import ROUNDING_FLOOR, cross_covariance, partial_isometries, procrustes

from ..adapters.layout import Adapter, AdapterGroup
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
) -> Tensor:
    """The rotations R (G, r, r) of one client's adapters of a group, softened by λ.

    The cross-covariance M is A A_refᵀ, BᵀB_ref or, aligned on both, A A_refᵀ/‖A_ref‖² + BᵀB_ref/‖B_ref‖².

    Raises:
        UpdateError: the products of the client's factors overflow.
    """
    frames = []
    if "A" in on:
        frames.append((group.A(client), group.A(reference)))
    if "B" in on:
        frames.append((group.B(client).mT, group.B(reference).mT))
    products = [cross_covariance(F, F_ref) for F, F_ref in frames]
    if len(on) > 1:
        products = [_relative(M, F_ref) for M, (_, F_ref) in zip(products, frames, strict=True)]
    M = products[0] if len(on) == 1 else products[0] + products[1]
    R, residual = procrustes(M, strength=strength, reflections=reflections, floor=ROUNDING_FLOOR[M.dtype])
    if client.ranks is not None:
        rows = torch.stack([rank_mask(a, [client])[0] for a in group.adapters]).to(R.device)
        padded = ~rows.all(1).squeeze(-1)
        R[padded], residual[padded] = partial_isometries(M[padded], rows[padded], strength)
    check_rotations(residual[:, None], group.adapters, [client.name])
    return R


def check_rotations(residual: Tensor, adapters: Sequence[Adapter], clients: Sequence[str]) -> None:
    """Raise UpdateError unless every matrix is a rotation, by the residuals ‖RᵀR − I‖_max, (L, N)."""
    wrong = ~(residual <= LARGEST_RESIDUAL)
    if bool(wrong.any()):
        client, adapter = (int(index[0]) for index in wrong.T.nonzero(as_tuple=True))
        where, far = f"{clients[client]}, {adapters[adapter].module}", float(residual[adapter, client])
        if math.isfinite(far):
            raise UpdateError(f"{where}: its rotation did not converge, ‖RᵀR − I‖_max is {far:.1e}; leave this client out")
        raise UpdateError(f"{where}: the products of its factors overflow; send float64, or scale them")


def _relative(M: Tensor, factor_ref: Tensor) -> Tensor:
    """M / ‖F_ref‖²; 0 where the reference is zero, which gives no direction."""
    squared = torch.linalg.matrix_norm(factor_ref.to(M.dtype), keepdim=True).square()
    return M / torch.where(squared == 0, 1, squared)
