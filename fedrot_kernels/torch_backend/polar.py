"""Polar factors of batches of matrices by Newton–Schulz, without an SVD.

Every function works in float32 (float64 for float64 input) whatever the input's dtype, because a rotation rounded to half
precision is no longer orthogonal. Leading dimensions are batch dimensions. Each matrix of a batch has the same result
whatever the others hold. ``reference.py`` states the same mathematics plainly.
"""

import math

import torch
from torch import Tensor

from ..precision import full_precision, working_dtype
from ..tolerances import COMPLETION_SHIFT, ROUNDING_FLOOR
from .newton_schulz import fast_pass, newton_schulz


@full_precision
def polar(M: Tensor, *, floor: float = 0.0) -> Tensor:
    """Compute the orthogonal polar factor; see ``ops.polar``."""
    dtype, r = working_dtype(M), M.shape[-1]
    if M.numel() == 0:
        return M.to(dtype, copy=True)
    X = M.to(dtype).reshape(-1, r, r)
    largest = X.abs().amax((-1, -2), keepdim=True)
    X = X / torch.where(largest == 0, 1, largest)  # before the norm, whose squares under- and overflow
    norm = torch.linalg.vector_norm(X, dim=(-1, -2), keepdim=True)
    eye = torch.eye(r, dtype=dtype, device=M.device)
    R = polar_of_normalized(torch.where(largest == 0, eye, X / norm), floor)
    R = torch.where(largest == 0, eye, R)  # exactly I, which the iteration misses by its rounding
    return torch.where(largest.isfinite(), R, torch.nan).reshape(M.shape)


def polar_of_normalized(X: Tensor, floor: float) -> Tensor:
    """The polar factor of X (n, r, r), σ ≤ 1; directions in which σ is below ``floor`` do not rotate."""
    if floor > ROUNDING_FLOOR[torch.float32]:  # the fast pass takes smaller σ than this floor for full rank
        return _polar_regularized(X, floor)
    R, remaining = fast_pass(X)
    if not len(remaining):
        return R
    rest, r = X[remaining], X.shape[-1]
    if floor:
        rest = _polar_regularized(rest, floor)
    else:
        shift = COMPLETION_SHIFT[X.dtype]
        rest = newton_schulz((rest + shift * torch.eye(r, dtype=X.dtype, device=X.device)) / (1 + shift * math.sqrt(r)))
    return R.index_copy(0, remaining, rest)


def _polar_regularized(X: Tensor, floor: float) -> Tensor:
    """The polar factor of X (n, r, r), σ ≤ 1, in two passes.

    Newton–Schulz needs a full-rank start, so add floor · I first: singular directions of X then map to the identity. The
    addition biases R by about floor. A second pass on RᵀX, which is nearly symmetric positive definite, removes that bias,
    because adding a multiple of I does not change the polar factor of such a matrix.
    """
    shift = floor * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    scale = 1 + 2 * floor
    R = newton_schulz((X + shift) / scale)
    return orthogonalize(R @ newton_schulz((R.mT @ X + shift) / scale))


def orthogonalize(R: Tensor) -> Tensor:
    """Take one Newton step to orthogonality, for a product of orthogonal matrices, which has been rounded."""
    return R - 0.5 * R @ (R.mT @ R - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device))
