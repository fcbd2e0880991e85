"""Products of frames and rotations on batches: cross-covariances and rotated averages."""

import torch
from torch import Tensor

from ..precision import full_precision, working_dtype


@full_precision
def cross_covariance(F: Tensor, F_ref: Tensor) -> Tensor:
    """Compute M = F F_refᵀ; see ``ops.cross_covariance``."""
    dtype = working_dtype(F, F_ref)
    return F.to(dtype) @ F_ref.to(dtype).mT


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
