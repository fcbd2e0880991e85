"""Procrustes rotations of batches of cross-covariances, without an SVD of those that are well-conditioned.

Newton–Schulz in the working dtype (float32, or float64 for float64) converges for condition numbers up to about 100, which
covers nearly all client updates. All other matrices are computed again in float64, by SVD on the CPU. Each matrix of a batch
has the same result whatever the others hold. ``reference.py`` states the same mathematics plainly.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_square, check_strength
from ..precision import full_precision, working_dtype
from ..tolerances import HALF_TURN, PRODUCT_FLOOR, SMALLEST_PRODUCT
from ..types import Rotations
from .newton_schulz import newton_schulz
from .polar import exact_polar, normalize

Exact = Callable[[Tensor], Tensor]
"""Indices (k,) on the CPU → these matrices (k, r, r) in float64 on the CPU, as exact as their source allows."""


@full_precision
def rotations(
    M: Tensor, exact: Exact | None = None, *, strength: float = 1.0, reflections: bool = False, floor: float | Tensor = 0.0
) -> Rotations:
    """Rotations of cross-covariances, softened by λ.

    Args:
        M: (..., r, r), any floating dtype.
        exact: the ill-conditioned ones of the M, flattened to (n, r, r), in float64; by default those given are exact.
        strength: λ in [0, 1].
        reflections: False for SO(r), True for O(r).
        floor: relative to ‖M‖_F, the size below which a direction of M says nothing, also one per matrix, (...); see
            ``exact_polar``.
    """
    r, shape, dtype = M.shape[-1], M.shape, working_dtype(M)
    M = M.to(dtype).reshape(-1, r, r)
    undetermined = torch.zeros(len(M), dtype=torch.int64, device=M.device)
    if M.numel() == 0 or strength == 0:
        R = torch.where(M.isfinite().all(-1, True).all(-2, True), _eye(M), torch.nan)
        return _shaped(R, undetermined, shape)
    X = normalize(M)
    R, remaining = newton_schulz(X)
    doubtful = torch.zeros(len(M), dtype=torch.bool, device=M.device).index_fill_(0, remaining, True)
    if not reflections:
        R = _flip(R, X, ~doubtful)
    if strength < 1:
        R, remaining = newton_schulz((1 - strength) * _eye(R) + strength * R)
        doubtful.index_fill_(0, remaining, True)
    largest = M.abs().amax((-1, -2))
    zero = largest == 0
    doubtful |= (largest < SMALLEST_PRODUCT) & ~zero
    if bool(doubtful.any()):
        indices = doubtful.nonzero().squeeze(-1).cpu()
        found = normalize(M[indices].double().cpu() if exact is None else exact(indices))
        floors = floor.cpu().reshape(-1)[indices] if isinstance(floor, Tensor) else floor
        careful, left = exact_polar(found, floors, reflections=reflections)
        if strength < 1:
            careful = exact_softened(careful, strength, HALF_TURN)
        indices = indices.to(M.device)
        R = R.index_copy(0, indices, careful.to(R))
        undetermined = undetermined.index_copy(0, indices, left.to(M.device))
    R = torch.where(zero[:, None, None], _eye(R), R)  # exactly I, which the iteration misses by its rounding
    return _shaped(R, undetermined.masked_fill(zero, r), shape)


def exact_softened(R: Tensor, strength: float, floor: float) -> Tensor:
    """polar((1−λ) I + λ R) of R (n, r, r) in float64, on the CPU; planes where that is zero do not rotate."""
    blend = (1 - strength) * _eye(R) + strength * R
    return exact_polar(blend, floor, reflections=True)[0]


@full_precision
def special_orthogonal(R: Tensor, M: Tensor) -> Tensor:
    """The best rotation with det = +1: where det(R) < 0, flip the direction in which that costs tr(RᵀM) least.

    Args:
        R: (..., r, r), the polar factor of M, float32 or float64.
        M: (..., r, r), the cross-covariance.

    Returns:
        (..., r, r): R (I − 2 v vᵀ) where det(R) < 0, v the eigenvector of the smallest eigenvalue of H = RᵀM; R elsewhere.

    Raises:
        ValueError: not square.
    """
    check_square(R=R, M=M)
    if R.numel() == 0:
        return R
    r = R.shape[-1]
    flat, X = R.reshape(-1, r, r), normalize(M.to(R.dtype).reshape(-1, r, r))
    return _flip(flat, X, torch.ones(len(flat), dtype=torch.bool, device=R.device)).reshape(R.shape)


def _flip(R: Tensor, X: Tensor, where: Tensor) -> Tensor:
    """``special_orthogonal`` of R (n, r, r), orthogonal, and X (n, r, r), ‖X‖_F = 1, for those R where (n,) is true."""
    reflected = (where & (torch.linalg.det(R) < 0)).nonzero().squeeze(-1)
    if not len(reflected):
        return R
    Q = R[reflected].double()
    H = Q.mT @ X[reflected].double()
    v = torch.linalg.eigh(H + H.mT).eigenvectors[..., :1]
    return R.index_copy(0, reflected, (Q - 2 * (Q @ v) @ v.mT).to(R.dtype))


@full_precision
def soften(R: Tensor, strength: float) -> Tensor:
    """R_λ = polar((1−λ) I + λ R), which goes from I at λ = 0 to R at λ = 1.

    A plane that R turns by 180° has the eigenvalue −1. It does not rotate up to λ = 0.5, where the blend is singular.

    Args:
        R: (..., r, r), orthogonal, float32 or float64.
        strength: λ in [0, 1].

    Returns:
        (..., r, r), of R's dtype.

    Raises:
        ValueError: not square, or a strength outside [0, 1].
    """
    check_square(R=R)
    check_strength(strength)
    if strength == 1 or R.numel() == 0:
        return R
    if strength == 0:
        return torch.where(R.isfinite().all(-1, True).all(-2, True), _eye(R), torch.nan)
    flat = R.reshape(-1, *R.shape[-2:])
    soft, remaining = newton_schulz((1 - strength) * _eye(flat) + strength * flat)
    if len(remaining):
        # R is orthogonal to the rounding of its dtype, and −1 an eigenvalue to that.
        floor = PRODUCT_FLOOR[R.dtype]
        careful = exact_softened(flat[remaining].double().cpu(), strength, floor)
        soft = soft.index_copy(0, remaining, careful.to(soft))
    return soft.reshape(R.shape)


def _shaped(R: Tensor, undetermined: Tensor, shape: torch.Size) -> Rotations:
    residual = R.new_zeros(len(R)) if not R.numel() else (R.mT @ R - _eye(R)).abs().amax((-1, -2))
    return Rotations(R.reshape(shape), residual.reshape(shape[:-2]), undetermined.reshape(shape[:-2]))


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
