"""Rotations, or invertible matrices, that minimise what averaging the factors loses.

E = Σ wₖBₖAₖ − B̄Ā with Ā = Σ wᵢHᵢAᵢ, B̄ = Σ wᵢBᵢGᵢ and Hᵢ = Gᵢ⁻¹. Along Gᵢ ← Gᵢ(I + t Xᵢ) the squared error changes by
−2t Σ wᵢ⟨Zᵢ, Xᵢ⟩ with Zᵢ = Gᵢᵀ(BᵢᵀEĀᵀ) − (HᵢAᵢEᵀB̄)ᵀ, and both terms are sums of Gram blocks.
"""

import torch
from torch import Tensor

from ..ops import polar
from .gram import Grams, Means, select

ROTATION_STEPS, MATRIX_STEPS = 20, 40
# ‖G‖_F‖G⁻¹‖_F / r, ‖G‖_F/√r and ‖G⁻¹‖_F/√r up to which an invertible matrix may go: its condition number is at most r times
# this, and no client's factors are scaled by more.
LARGEST_CONDITION = 10.0
# Of the curvature, relative to its mean, below which a direction counts as no flatter.
_RIDGE = 0.1
# By which a step may become shorter or longer than the last.
_SHORTER, _LONGER = 0.1, 4.0


def least_error_rotations(grams: Grams, R: Tensor) -> Tensor:
    """Descent over rotations, along X = (B̄ᵀB̄)⁻¹ Z (ĀĀᵀ)⁻¹ of the skew part of Z, and back onto the group by ``polar``.

    Args:
        grams: of the clients' factors.
        R: (G, n, r, r), where to begin; each result is in the same component of O(r), and no worse.
    """
    now, step = grams.at(R, R.mT), _first_step(grams)
    for _ in range(ROTATION_STEPS):
        Z = _skew(_gradient(grams, R, R.mT, now))
        X = _skew(_preconditioned(Z, now))
        R_next = polar(_moved(R, X, step))
        found = grams.at(R_next, R_next.mT)
        better, step = _judged(grams, Z, X, step, now, found)
        R, now = select(better, R_next, R), found.where(better, now)
    return R


def least_error_matrices(grams: Grams, R: Tensor) -> tuple[Tensor, Tensor]:
    """Descent over invertible matrices, along X = (B̄ᵀB̄)⁻¹ Z (ĀĀᵀ)⁻¹.

    A client whose matrix would become worse conditioned or larger than ``LARGEST_CONDITION`` allows stays where it is in
    that step; one of weight 0, which no error tells where to go, stays where it began.

    Args:
        grams: of the clients' factors.
        R: (G, n, r, r), rotations to begin with.

    Returns:
        G and H = G⁻¹, (G, n, r, r).
    """
    G, H, now, step = R, R.mT, grams.at(R, R.mT), _first_step(grams)
    r = R.shape[-1]
    for _ in range(MATRIX_STEPS):
        Z = _gradient(grams, G, H, now)
        X = torch.where(grams.w > 0, _preconditioned(Z, now), 0)
        G_next = _moved(G, X, step)
        H_next, singular = torch.linalg.inv_ex(G_next)
        size_G, size_H = (torch.linalg.matrix_norm(x) / r**0.5 for x in (G_next, H_next))
        largest = torch.maximum(size_G * size_H, torch.maximum(size_G, size_H))
        fits = ((largest <= LARGEST_CONDITION) & (singular == 0))[..., None, None]
        G_next, H_next = torch.where(fits, G_next, G), torch.where(fits, H_next, H)
        found = grams.at(G_next, H_next)
        better, step = _judged(grams, Z, torch.where(fits, X, 0), step, now, found)
        G, H, now = select(better, G_next, G), select(better, H_next, H), found.where(better, now)
    return G, H


def _first_step(grams: Grams) -> Tensor:
    """(G,): half of what would be right if the mean's factors were all there is to the curvature."""
    return torch.full_like(grams.size, 0.5)


def _moved(G: Tensor, X: Tensor, step: Tensor) -> Tensor:
    return G @ (torch.eye(G.shape[-1], dtype=G.dtype, device=G.device) + step[:, None, None, None] * X)


def _judged(grams: Grams, Z: Tensor, X: Tensor, step: Tensor, now: Means, found: Means) -> tuple[Tensor, Tensor]:
    """Whether a step has lowered the error, and the next one's length: where the parabola through what was found, with the
    slope −2 Σ wᵢ⟨Zᵢ, Xᵢ⟩ at its beginning, is least. Both (G,)."""
    slope = -2 * step * (grams.w * Z * X).sum((1, 2, 3))
    bend = found.error - now.error - slope
    best = torch.where(bend > 0, -slope / (2 * bend), torch.inf)
    return found.error < now.error, step * best.nan_to_num(_SHORTER, _LONGER).clamp(_SHORTER, _LONGER)


def _gradient(grams: Grams, G: Tensor, H: Tensor, at: Means) -> Tensor:
    """Z (G, n, r, r)."""
    BEA = grams.B(grams.w * at.P) - at.Q @ at.a[:, None]
    AEB = grams.A(grams.w * at.Q) - at.P @ at.b[:, None]
    return G.mT @ BEA - (H @ AEB).mT


def _skew(X: Tensor) -> Tensor:
    return (X - X.mT) / 2


def _preconditioned(Z: Tensor, at: Means) -> Tensor:
    """(B̄ᵀB̄)⁻¹ Z (ĀĀᵀ)⁻¹: the error of one client changes by about ‖B̄ᵀB̄ X ĀĀᵀ‖ along X."""
    X = torch.linalg.solve(_ridged(at.b)[:, None], Z)
    return torch.linalg.solve(_ridged(at.a)[:, None], X.mT).mT


def _ridged(gram: Tensor) -> Tensor:
    """(G, r, r), invertible."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(mean > 0, _RIDGE * mean, 1)
    return gram + ridge[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
