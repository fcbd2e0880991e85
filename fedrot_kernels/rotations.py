"""Rotations of frames towards reference frames: of one client's adapters, or of any batch of frames."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import use_triton
from .ops import cross_covariance, procrustes
from .precision import full_precision, working_dtype
from .tolerances import FACTOR_FLOOR, PRODUCT_FLOOR
from .torch_backend import procrustes as torch_procrustes
from .torch_backend.products import exact_cross_covariance, relative_to_reference
from .types import Rotations

Frames = tuple[Tensor, Tensor]
"""F (..., r, d) and F_ref, which is broadcast against it."""


@full_precision
def frame_rotations(
    frames: Sequence[Frames],
    *,
    strength: float = 1.0,
    reflections: bool = False,
    rank_mask: Tensor | None = None,
    floor: float | Tensor | None = None,
) -> Rotations:
    """The rotations that bring frames F nearest to the reference F_ref, softened by λ.

    Args:
        frames: one pair, of which M is F F_refᵀ; or several, of which M is the sum of F F_refᵀ/‖F_ref‖² (0 for F_ref = 0).
        strength: λ in [0, 1].
        reflections: False for SO(r), True for O(r).
        rank_mask: (..., r, 1), bool: which rows are a client's own, where others are padded with zeros; None if all are.
        floor: relative to ‖M‖_F, the size below which a direction says nothing, also one per frame, (...); by default the
            ``FACTOR_FLOOR`` of the frames' dtypes. In the Triton kernels it is ``PRODUCT_FLOOR``.

    Returns:
        R (..., r, r), float32 (float64 for float64). Directions in which M is below the floor do not rotate and are counted.
        All others are exact to the rounding of the result; in the kernels, to PRODUCT_FLOOR/2 ‖M‖_F over the sum of the two
        smallest singular values of M.

    Raises:
        ValueError: a ``rank_mask`` of another shape.
    """
    products = [cross_covariance(F, F_ref) for F, F_ref in frames]
    if len(frames) > 1:
        products = [relative_to_reference(M, _square(F_ref)) for M, (_, F_ref) in zip(products, frames, strict=True)]
    M = sum(products[1:], products[0])
    inputs = [x for pair in frames for x in pair]
    if floor is None:
        floor = max(FACTOR_FLOOR[x.dtype] for x in inputs)
    if use_triton("auto", inputs, M.shape[-1]):
        found = procrustes(M, strength=strength, reflections=reflections, floor=PRODUCT_FLOOR[M.dtype])
    else:

        def exact(indices: Tensor) -> Tensor:
            places = torch.unravel_index(indices, M.shape[:-2] or torch.Size([1]))
            # One by one: a batch of other size may round otherwise.
            chosen = zip(*(x.tolist() for x in places), strict=True)
            return torch.stack([exact_cross_covariance(_at(frames, M.shape[:-2], place)) for place in chosen])

        found = torch_procrustes.rotations(M, exact, strength=strength, reflections=reflections, floor=floor)
    if rank_mask is None:
        return found
    if rank_mask.shape != (*M.shape[:-1], 1):
        raise ValueError(f"rank_mask must have shape {(*M.shape[:-1], 1)}, one entry per row, got {tuple(rank_mask.shape)}")
    padded = ~rank_mask.all(-2).squeeze(-1)
    places = [tuple(place) for place in padded.nonzero().tolist()]
    if places:
        M_own = torch.stack([exact_cross_covariance(_at(frames, M.shape[:-2], place)) for place in places])
        floors = floor[padded.to(floor.device)] if isinstance(floor, Tensor) else floor
        own = partial_isometries(M_own, rank_mask[padded].cpu(), strength, floors)
        for of_all, of_padded in zip(found, own, strict=True):
            of_all[padded] = of_padded.to(of_all)
    return found


def partial_isometries(M: Tensor, rank_mask: Tensor, strength: float, floor: float | Tensor) -> Rotations:
    """Compute the softened rotations of padded clients.

    The rotation of a padded client is a partial isometry: only its first rᵢ rows are used, and the other rows are set to
    zero. With J = [I 0] of rᵢ rows it is polar((1−λ) J + λ polar(Mᵢ)). It is the same in SO(r) and O(r), because the unused
    rows can complete it to either determinant.

    Args:
        M: (G, r, r), cross-covariances; rows of zero where a client is padded. float64.
        rank_mask: (G, r, 1), bool: which rows are the client's own.
        strength: λ in [0, 1].
        floor: as in ``frame_rotations``, also one per matrix, (G,).

    Returns:
        R (G, r, r); ‖RᵀR − I‖_max (G,) before the other rows are set to zero; and how many of the client's own directions
        are undetermined.
    """
    R, residual, undetermined = torch_procrustes.rotations(M, reflections=True, floor=floor)
    undetermined = (undetermined - (~rank_mask).sum((-2, -1)).to(undetermined)).clamp_min(0)  # 0 where M is not finite
    if strength < 1:
        eye = torch.eye(M.shape[-1], dtype=R.dtype, device=R.device)
        blend = torch.where(rank_mask, (1 - strength) * eye + strength * R, 0)
        R, residual, _ = torch_procrustes.rotations(blend, reflections=True, floor=floor)
    return Rotations(R * rank_mask, residual, undetermined)


def _square(F_ref: Tensor) -> Tensor:
    wide = F_ref.to(working_dtype(F_ref))
    return wide.square().sum((-1, -2), keepdim=True)


def _at(frames: Sequence[Frames], batch: torch.Size, place: tuple[int, ...]) -> list[Frames]:
    """The frames (r, d) of one place of the batch."""
    expanded = [[x.expand(*(batch or [1]), *x.shape[-2:]) for x in pair] for pair in frames]
    return [(F[place], F_ref[place]) for F, F_ref in expanded]
