"""Products of frames and rotations on batches: cross-covariances and rotated averages."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..precision import full_precision, working_dtype


@full_precision
def cross_covariance(F: Tensor, F_ref: Tensor) -> Tensor:
    """Compute M = F F_refᵀ; see ``ops.cross_covariance``."""
    dtype = working_dtype(F, F_ref)
    return F.to(dtype) @ F_ref.to(dtype).mT


def exact_cross_covariance(frames: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """M = F F_refᵀ in float64, on the CPU; of several frames the sum of F F_refᵀ/‖F_ref‖².

    Args:
        frames: pairs F (..., r, d) and F_ref (..., r, d).
    """
    wide = [(F.double(), F_ref.to(F.device).double()) for F, F_ref in frames]
    if len(wide) == 1:
        return (wide[0][0] @ wide[0][1].mT).cpu()
    norms = [F_ref.square().sum((-1, -2), keepdim=True) for _, F_ref in wide]
    terms = [relative_to_reference(F @ F_ref.mT, norm) for (F, F_ref), norm in zip(wide, norms, strict=True)]
    return torch.stack(terms).sum(0).cpu()


def relative_to_reference(M: Tensor, squared_norm: Tensor) -> Tensor:
    """M / ‖F_ref‖², which makes the cross-covariances of A and B comparable; M itself, which is zero, if F_ref is zero.

    Args:
        M: (..., r, r), cross-covariances.
        squared_norm: ‖F_ref‖², broadcast against M.
    """
    return M / torch.where(squared_norm == 0, 1, squared_norm)


@full_precision
def rotate_add_(total: Tensor, F: Tensor, R: Tensor, weight: float) -> Tensor:
    """Add weight · RᵀF to total, in place: one client's share of a rotated average.

    Args:
        total: (..., r, d), float32 or float64.
        F: (..., r, d), any floating dtype: A, or B.mT (with total.mT).
        R: (..., r, r).
        weight: the client's weight.

    Returns:
        total.
    """
    return total.add_(R.mT.to(total.dtype) @ F.to(total.dtype), alpha=weight)


@full_precision
def rotate_average(F: Tensor, R: Tensor | None, weights: Tensor) -> Tensor:
    """Compute Σ wᵢ RᵢᵀFᵢ; see ``ops.rotate_average``."""
    w = weights.double()
    total = torch.zeros(F.shape[1:], dtype=working_dtype(F), device=F.device)
    for i, weight in enumerate((w / w.sum()).tolist()):
        if R is None:
            total.add_(F[i], alpha=weight)
        else:
            rotate_add_(total, F[i], R[i], weight)
    return total
