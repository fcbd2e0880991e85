"""Rotations that minimise the aggregation error.

The error is E = Σ wₖBₖAₖ − B̄Ā with Ā = Σ wᵢRᵢᵀAᵢ and B̄ = Σ wᵢBᵢRᵢ. Along Rᵢ ← Rᵢ(I + t Xᵢ), Xᵢ skew, ‖E‖² changes by
−2t Σ wᵢ⟨Zᵢ, Xᵢ⟩ with Zᵢ = Rᵢᵀ(BᵢᵀEĀᵀ) − (RᵢᵀAᵢEᵀB̄)ᵀ. Both terms are sums of Gram blocks.
"""

import torch
from torch import Tensor

from ..ops import polar
from ..stopping import (
    ERROR_ROUNDING_SQUARED,
    FIRST_STEP,
    LEAST_ERROR,
    LEAST_ERROR_STEPS,
    LONGER_STEP,
    SHORTER_STEP,
    UNBOUNDED_STEP,
)
from ..tolerances import CURVATURE_RIDGE
from .gram import Grams, Means, select


def least_error_rotations(grams: Grams, R: Tensor) -> Tensor:
    """Descend over rotations along X = (B̄ᵀB̄)⁻¹ Z (ĀĀᵀ)⁻¹ of the skew part of Z, and return to the group by ``polar``.

    An adapter is left when a step along X would lower its squared error by less than ``LEAST_ERROR`` of it.

    Args:
        grams: Gram matrices of the clients' factors.
        R: (G, n, r, r), where to begin.

    Returns:
        R (G, n, r, r), each in the same component of O(r) as it began, and of no larger error.
    """
    now, step = grams.at(R), torch.full_like(grams.size, FIRST_STEP)
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    going = torch.ones_like(grams.size, dtype=torch.bool)
    for _ in range(LEAST_ERROR_STEPS):
        Z = _skew(_gradient(grams, R, now))
        X = _skew(_preconditioned(Z, now))
        R_next = polar(R @ (eye + step[:, None, None, None] * X))
        found = grams.at(R_next)
        better, gain, step = going & (found.error < now.error), *_parabola(grams, Z, X, step, now, found)
        R, now = select(better, R_next, R), found.where(better, now)
        going &= (gain > LEAST_ERROR * now.error) & (now.error > ERROR_ROUNDING_SQUARED * grams.update)
        if not bool(going.any()):
            break
    return R


def _parabola(grams: Grams, Z: Tensor, X: Tensor, step: Tensor, now: Means, found: Means) -> tuple[Tensor, Tensor]:
    """The parabola through both squared errors with the slope −2 Σ wᵢ⟨Zᵢ, Xᵢ⟩ at 0.

    Returns:
        How far it falls, Inf if it has no minimum, and the length of the step to its minimum, bounded; both (G,).
    """
    slope = -2 * step * (grams.w * Z * X).sum((1, 2, 3))
    bend = found.error - now.error - slope
    gain = torch.where(bend > 0, slope.square() / (4 * bend), torch.where(slope < 0, torch.inf, 0))
    best = torch.where(bend > 0, -slope / (2 * bend), UNBOUNDED_STEP)
    unknown = (bend.abs() <= ERROR_ROUNDING_SQUARED * grams.update) & (slope < 0)
    gain, best = torch.where(unknown, torch.inf, gain), torch.where(unknown, LONGER_STEP, best)
    return gain, step * best.nan_to_num(SHORTER_STEP).clamp(SHORTER_STEP, LONGER_STEP)


def _gradient(grams: Grams, R: Tensor, means: Means) -> Tensor:
    """Z (G, n, r, r)."""
    BEA = grams.B(grams.w * means.P) - means.Q @ means.a[:, None]
    AEB = grams.A(grams.w * means.Q) - means.P @ means.b[:, None]
    return R.mT @ BEA - (R.mT @ AEB).mT


def _skew(X: Tensor) -> Tensor:
    return (X - X.mT) / 2


def _preconditioned(Z: Tensor, means: Means) -> Tensor:
    """(B̄ᵀB̄)⁻¹ Z (ĀĀᵀ)⁻¹: along X the error of one client changes by about ‖B̄ᵀB̄ X ĀĀᵀ‖."""
    X = torch.linalg.solve(_add_ridge(means.b)[:, None], Z)
    transposed: Tensor = torch.linalg.solve(_add_ridge(means.a)[:, None], X.mT)
    return transposed.mT


def _add_ridge(gram: Tensor) -> Tensor:
    """The Gram matrices (G, r, r), made invertible."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(mean > 0, CURVATURE_RIDGE * mean, 1)
    return gram + ridge[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
