"""One client's rotation towards a reference."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedrot_kernels import NOISE, cross_covariance, full_precision, procrustes, rotate_add_

from ..adapters.checks import check_range, not_finite, open_reference
from ..adapters.layout import Adapter, Batch, Layout
from ..adapters.update import StateDict, Update, UpdateLike, open_update
from ..errors import UpdateError
from ..options import Alignment, AlignOn, Factor, RotationGroup, Strength
from ..ranks.padding import own_rows, partial_isometries

# ‖RᵀR − I‖_max up to which a rotation counts as one; those that converge end a hundred times below.
LARGEST_RESIDUAL = 1e-4


def rotations(alignment: Alignment, batch: Batch, client: Update, reference: StateDict, on: tuple[Factor, ...]) -> Tensor:
    """R (G, r, r) of one client's adapters of a batch.

    M is A A_refᵀ, BᵀB_ref or, aligned on both, A A_refᵀ/‖A_ref‖² + BᵀB_ref/‖B_ref‖².

    Raises:
        UpdateError: the products of the client's factors overflow.
    """
    frames = []
    if "A" in on:
        frames.append((batch.A(client), batch.A(reference)))
    if "B" in on:
        frames.append((batch.B(client).mT, batch.B(reference).mT))
    products = [cross_covariance(F, F_ref) for F, F_ref in frames]
    if len(on) > 1:
        products = [_relative(M, F_ref) for M, (_, F_ref) in zip(products, frames, strict=True)]
    M = products[0] if len(on) == 1 else products[0] + products[1]
    R, residual = procrustes(M, strength=alignment.fixed_strength, special=alignment.group == "SO", noise=NOISE[M.dtype])
    if client.ranks is not None:
        rows = torch.stack([own_rows(a, [client])[0] for a in batch.adapters]).to(R.device)
        padded = ~rows.all(1).squeeze(-1)
        R[padded], residual[padded] = partial_isometries(M[padded], rows[padded], alignment.fixed_strength)
    check_rotations(residual[:, None], batch.adapters, [client.name])
    return R


def check_single(alignment: Alignment) -> None:
    """Raise ValueError unless one client can align itself."""
    if alignment.mutual:
        what = 'align_on="error"' if alignment.align_on == "error" else 'strength="auto"'
        raise ValueError(f"{what} depends on the updates of all clients: the server aligns them, with aggregate(updates)")


def check_rotations(residual: Tensor, adapters: Sequence[Adapter], clients: Sequence[str]) -> None:
    """Raise UpdateError unless every rotation is one: residual (L, N) is ‖RᵀR − I‖_max of each."""
    wrong = ~(residual <= LARGEST_RESIDUAL)
    if bool(wrong.any()):
        client, adapter = (int(index[0]) for index in wrong.T.nonzero(as_tuple=True))
        where, far = f"{clients[client]}, {adapters[adapter].module}", float(residual[adapter, client])
        if math.isfinite(far):
            raise UpdateError(f"{where}: its rotation did not converge, ‖RᵀR − I‖_max is {far:.1e}; leave this client out")
        raise UpdateError(f"{where}: the products of its factors overflow; send float64, or scale them")


def _relative(M: Tensor, factor_ref: Tensor) -> Tensor:
    """M / ‖F_ref‖²; a reference that is zero says nothing, and M is zero with it."""
    squared = torch.linalg.matrix_norm(factor_ref.to(M.dtype), keepdim=True).square()
    return M / torch.where(squared == 0, 1, squared)


@full_precision
def align(
    update: UpdateLike,
    reference: UpdateLike,
    *,
    align_on: AlignOn = "alternate",
    round: int = 0,
    strength: Strength | None = None,
    group: RotationGroup = "SO",
) -> dict[str, Tensor]:
    """One client's update, rotated towards the reference: for clients that rotate before they send.

    Averaging aligned updates plainly is ``aggregate`` with the same options, to the rounding of the dtype. Every B·A
    stays what it was, to the rounding of the dtype.

    Args:
        update: a PEFT state dict or folder.
        reference: the global adapter the client started from, likewise.
        align_on, round, strength, group: as in ``aggregate``, but for "error", "auto" and "GL", which depend on all clients.

    Returns:
        A state dict of the update's keys, shapes and dtypes; plain tensors (heads, biases, magnitudes) as they came.

    Raises:
        UpdateError: NaN or Inf in a factor, or a reference with other adapters.
        ValueError: an alignment that one client cannot compute.
    """
    alignment = Alignment(align_on, strength, group)
    check_single(alignment)
    client = open_update(update, "the update")
    layout = Layout(client.specs, client.name)
    target = open_reference(reference, client, layout)
    if found := not_finite(client):
        raise UpdateError(f"{client.name}, {found}")
    aligned = {client.keys_given[key]: client[key].detach() for key in client}
    if alignment.strength == 0:
        return aligned
    for batch in layout.batches:
        R = rotations(alignment, batch, client, target, alignment.factors(round))
        A, B = batch.A(client), batch.B(client)
        A_aligned = rotate_add_(torch.zeros_like(A, dtype=R.dtype), A, R, 1.0)
        B_aligned = rotate_add_(torch.zeros_like(B, dtype=R.dtype).mT, B.mT, R, 1.0).mT
        for i, a in enumerate(batch.adapters):
            for key, factor in ((a.key_A, A_aligned[i]), (a.key_B, B_aligned[i])):
                spec = layout.specs[key]
                aligned[client.keys_given[key]] = factor.to(spec.dtype).reshape(spec.shape).clone()
    check_range(aligned, f"{client.name}, aligned,")
    return aligned
