"""The operations on batches, in plain PyTorch and without an SVD: the path for CPU tensors.

Every function works in float32 (float64 for float64 input) whatever the input's dtype, because a rotation rounded to
half precision is no longer orthogonal, and none is differentiated through. Leading dimensions are batch dimensions;
each matrix of a batch comes out the same whatever its neighbours hold. ``reference.py`` is the same mathematics, plain.
"""

import math

import torch
from torch import Tensor

from ..precision import full_precision
from .newton_schulz import newton_schulz, short_way

# Added to M/‖M‖_F as a multiple of I, so that directions in which M says nothing do not rotate. A third of eps: below
# the singular values of a matrix of condition number 1e7 even in float32, where 1e-5 costs a Procrustes gap of up to
# 5e-4 and this at most 1e-6.
SHIFT = {torch.float32: 4e-8, torch.float64: 7e-17}
# The relative error to expect of a product of two matrices or of a rotation, with room: a hundred times eps.
NOISE = {torch.float32: 1e-5, torch.float64: 2e-14}


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if one of the tensors is.

    Raises:
        TypeError: not floating-point.
    """
    for x in tensors:
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point tensor, got {x.dtype}")
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def check_square(**matrices: Tensor) -> None:
    """Raise ValueError unless these are (..., r, r)."""
    for name, x in matrices.items():
        if x.dim() < 2 or x.shape[-1] != x.shape[-2]:
            raise ValueError(f"{name} must have shape (..., r, r), got {tuple(x.shape)}")


def check_frames(F: Tensor, F_ref: Tensor) -> None:
    """Raise ValueError unless these are frames of one shape (..., r, d)."""
    if F.dim() < 2 or F_ref.dim() < 2 or F.shape[-2:] != F_ref.shape[-2:]:
        raise ValueError(f"F and F_ref must both end in (r, d), got {tuple(F.shape)} and {tuple(F_ref.shape)}")


def check_strength(strength: float) -> None:
    """Raise ValueError unless λ is in [0, 1]."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")


def check_weights(weights: Tensor) -> None:
    """Raise ValueError unless weights can be averaged with."""
    w = weights.double()
    if not (bool((w >= 0).all()) and bool(w.isfinite().all()) and bool(w.any())):
        raise ValueError(f"weights must be finite, non-negative and not all zero, got {weights.tolist()}")


@full_precision
def cross_covariance(F: Tensor, F_ref: Tensor) -> Tensor:
    """See ``ops.cross_covariance``."""
    dtype = working_dtype(F, F_ref)
    return F.to(dtype) @ F_ref.to(dtype).mT


def _polar_at_rest(X: Tensor, noise: float) -> Tensor:
    """The polar factor of X (n, r, r), σ ≤ 1; directions in which X is smaller than ``noise`` do not rotate."""
    shift = noise * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    scale = 1 + 2 * noise
    R = newton_schulz((X + shift) / scale)
    # The shift has turned R by about its own size. Seen from R, X is all but positive definite, which no shift turns.
    return _polish(R @ newton_schulz((R.mT @ X + shift) / scale))


def _polar_of_scaled(X: Tensor, noise: float) -> Tensor:
    """The polar factor of X (n, r, r), σ ≤ 1."""
    if noise > NOISE[torch.float32]:  # the short way's word for full rank is too weak
        return _polar_at_rest(X, noise)
    R, left = short_way(X)
    if not len(left):
        return R
    rest, r = X[left], X.shape[-1]
    if noise:
        rest = _polar_at_rest(rest, noise)
    else:
        shift = SHIFT[X.dtype]
        rest = newton_schulz((rest + shift * torch.eye(r, dtype=X.dtype, device=X.device)) / (1 + shift * math.sqrt(r)))
    return R.index_copy(0, left, rest)


def _polish(R: Tensor) -> Tensor:
    """One Newton step to orthogonality, for products of orthogonal matrices, which round."""
    return R - 0.5 * R @ (R.mT @ R - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device))


@full_precision
def polar(M: Tensor, *, noise: float = 0.0) -> Tensor:
    """See ``ops.polar``."""
    dtype, r = working_dtype(M), M.shape[-1]
    if M.numel() == 0:
        return M.to(dtype, copy=True)
    X = M.to(dtype).reshape(-1, r, r)
    largest = X.abs().amax((-1, -2), keepdim=True)
    X = X / torch.where(largest == 0, 1, largest)  # before the norm, whose squares under- and overflow
    norm = torch.linalg.vector_norm(X, dim=(-1, -2), keepdim=True)
    eye = torch.eye(r, dtype=dtype, device=M.device)
    R = _polar_of_scaled(torch.where(largest == 0, eye, X / norm), noise)
    R = torch.where(largest == 0, eye, R)  # to the last bit, which the iteration would miss
    return torch.where(largest.isfinite(), R, torch.nan).reshape(M.shape)


@full_precision
def special_orthogonal(R: Tensor, M: Tensor) -> Tensor:
    """The best rotation with det = +1: where det(R) < 0, flip the direction in which that costs tr(RᵀM) least.

    Args:
        R: (..., r, r), the polar factor of M.
        M: (..., r, r), the cross-covariance.

    Returns:
        (..., r, r): R (I − 2 v vᵀ) where det(R) < 0, v the weakest eigenvector of H = RᵀM; R elsewhere.
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
    P = 1.001 * torch.eye(r, dtype=R.dtype, device=R.device) - H
    # Powers of I − H/‖H‖ leave the eigenvector of H's smallest eigenvalue (1.001 I: for r = 1 the difference is 0). Any
    # unit v gives det = +1 exactly; the power 2¹⁰ is enough for the objective to be within 1e-4 of the best.
    for _ in range(10):
        P = P @ P
        P = P / P.abs().amax((-1, -2), keepdim=True)
    column = torch.linalg.vector_norm(P, dim=-2).argmax(-1)
    v = P.gather(-1, column[:, None, None].expand(-1, r, 1))
    v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    return R.index_copy(0, reflected, _polish(Q - 2 * (Q @ v) @ v.mT)).reshape(shape)


@full_precision
def soften(R: Tensor, strength: float) -> Tensor:
    """R_λ = polar((1−λ) I + λ R), from I at λ = 0 to R at λ = 1; an eigenvalue −1 does not rotate up to λ = 0.5.

    Args:
        R: (..., r, r), orthogonal, float32 or float64.
        strength: λ in [0, 1].
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
    return _polar_of_scaled(X, NOISE[R.dtype]).reshape(R.shape)


@full_precision
def procrustes(M: Tensor, *, strength: float = 1.0, special: bool = False, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """See ``ops.procrustes``."""
    R = polar(M, noise=noise)
    if special:
        R = special_orthogonal(R, M)
    R = soften(R, strength)
    r = R.shape[-1]
    if R.numel() == 0:
        return R, R.new_zeros(R.shape[:-2])
    flat = R.reshape(-1, r, r)
    return R, (flat.mT @ flat - torch.eye(r, dtype=R.dtype, device=R.device)).abs().amax((-1, -2)).reshape(R.shape[:-2])


@full_precision
def rotate_add_(total: Tensor, F: Tensor, R: Tensor, weight: float) -> Tensor:
    """total += weight · RᵀF in place: one client's share of the rotated average.

    Args:
        total: (..., r, d), float32 or float64.
        F: (..., r, d), any floating dtype: A, or B.mT (with total.mT).
        R: (..., r, r).
        weight: the client's weight.
    """
    return total.add_(R.mT.to(total.dtype) @ F.to(total.dtype), alpha=weight)


@full_precision
def rotate_average(F: Tensor, R: Tensor | None, weights: Tensor) -> Tensor:
    """See ``ops.rotate_average``."""
    w = weights.double()
    total = torch.zeros(F.shape[1:], dtype=working_dtype(F), device=F.device)
    for i, weight in enumerate((w / w.sum()).tolist()):
        if R is None:
            total.add_(F[i], alpha=weight)
        else:
            rotate_add_(total, F[i], R[i], weight)
    return total
