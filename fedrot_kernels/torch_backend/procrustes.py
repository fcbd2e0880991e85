"""Procrustes rotations of batches of cross-covariances: polar factors, made rotations and softened."""

import torch
from torch import Tensor

from ..checks import check_square, check_strength
from ..precision import full_precision
from ..tolerances import ROUNDING_FLOOR, SQUARINGS, WEAKEST_SHIFT
from .polar import orthogonalize, polar, polar_of_normalized


@full_precision
def special_orthogonal(R: Tensor, M: Tensor) -> Tensor:
    """The best rotation with det = +1: where det(R) < 0, flip the direction in which that costs tr(RᵀM) least.

    Args:
        R: (..., r, r), the polar factor of M, float32 or float64.
        M: (..., r, r), the cross-covariance.

    Returns:
        (..., r, r): R (I − 2 v vᵀ) where det(R) < 0, v the weakest eigenvector of H = RᵀM; R elsewhere.

    Raises:
        ValueError: not square.
    """
    check_square(R=R, M=M)
    if R.numel() == 0:
        return R
    shape, r = R.shape, R.shape[-1]
    R, M = R.reshape(-1, r, r), M.to(R.dtype).reshape(-1, r, r)
    reflected = (torch.linalg.det(R) < 0).nonzero().squeeze(-1)
    if not len(reflected):
        return R.reshape(shape)
    Q, M = R[reflected], M[reflected]
    tiny = torch.finfo(M.dtype).tiny
    H = Q.mT @ (M / M.abs().amax((-1, -2), keepdim=True).clamp_min(tiny))
    H = H / torch.linalg.matrix_norm(H, keepdim=True).clamp_min(tiny)
    P = WEAKEST_SHIFT * torch.eye(r, dtype=R.dtype, device=R.device) - H
    for _ in range(SQUARINGS):
        P = P @ P
        P = P / P.abs().amax((-1, -2), keepdim=True)
    column = torch.linalg.vector_norm(P, dim=-2).argmax(-1)
    v = P.gather(-1, column[:, None, None].expand(-1, r, 1))
    v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    return R.index_copy(0, reflected, orthogonalize(Q - 2 * (Q @ v) @ v.mT)).reshape(shape)


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
    r = R.shape[-1]
    eye = torch.eye(r, dtype=R.dtype, device=R.device)
    if strength == 0:
        return torch.where(R.isfinite().all(-1, True).all(-2, True), eye, torch.nan)
    X = ((1 - strength) * eye + strength * R).reshape(-1, r, r)
    return polar_of_normalized(X, ROUNDING_FLOOR[R.dtype]).reshape(R.shape)


@full_precision
def procrustes(M: Tensor, *, strength: float = 1.0, reflections: bool = False, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Compute rotations and how far from orthogonal they are; see ``ops.procrustes``."""
    R = polar(M, floor=floor)
    if not reflections:
        R = special_orthogonal(R, M)
    R = soften(R, strength)
    r = R.shape[-1]
    if R.numel() == 0:
        return R, R.new_zeros(R.shape[:-2])
    flat = R.reshape(-1, r, r)
    return R, (flat.mT @ flat - torch.eye(r, dtype=R.dtype, device=R.device)).abs().amax((-1, -2)).reshape(R.shape[:-2])
