"""The Newton-Schulz iteration on batches of small matrices, in plain PyTorch.

Every matrix takes the same steps, whatever its neighbours hold; those that have converged at the end of a leg of the
schedule leave, the others take the next one.
"""

import math

import torch
from torch import Tensor

from ..schedule import CLASSIC, LONG, PERTURBATION, SHORT

# ‖XᵀX − I‖_F at which one more classic step is the last: it leaves |σ − 1| at most 2.5 (tol / 2)³.
_CONVERGED = {torch.float32: 3e-3, torch.float64: 1e-5}
# On a CPU, large batches of matrices up to this rank are quicker as sums over the whole batch than with torch.bmm: half
# the time at r = 4.
_ELEMENTWISE_RANK, _ELEMENTWISE_BATCH = 4, 256


def newton_schulz(X: Tensor) -> Tensor:
    """Drive every singular value of X (n, r, r), all at most 1, to 1. Non-finite matrices come out as they may."""
    result, left = short_way(X)
    for leg in range(4):
        if not len(left):
            break
        X = result[left]
        if leg == 2:  # after two legs only a singular matrix is left that no multiple of I completes (a nilpotent one)
            X = X + PERTURBATION * _generic_matrix(X)
        X, still = _take(LONG, X)
        result, left = result.index_copy(0, left, X), left[still]
    return result


def short_way(X: Tensor) -> tuple[Tensor, Tensor]:
    """The first leg, on X (n, r, r), σ ≤ 1.

    Returns:
        (n, r, r), and the indices of those that have not converged: none of a condition number up to about 100, and all
        finite ones over 1000.
    """
    return _take(SHORT, X)


def _take(steps: tuple[tuple[float, float, float], ...], X: Tensor) -> tuple[Tensor, Tensor]:
    if X.dtype == torch.float64:
        steps = (*steps, CLASSIC)
    if X.shape[-1] <= _ELEMENTWISE_RANK and len(X) >= _ELEMENTWISE_BATCH and X.device.type == "cpu":
        X, squares = _batch_last(steps, X.permute(1, 2, 0).contiguous())
        X = X.permute(2, 0, 1).contiguous()
    else:
        X, squares = _batch_first(steps, X)
    # Written so that NaN counts as finished.
    return X, (squares > _CONVERGED[X.dtype] ** 2).nonzero().squeeze(-1)


def _batch_first(steps: tuple[tuple[float, float, float], ...], X: Tensor) -> tuple[Tensor, Tensor]:
    """X ← X (a I + b G + c G²) on (n, r, r); and ‖XᵀX − I‖_F² (n,) before the last step."""
    for a, b, c in steps[:-1]:
        G = torch.bmm(X.mT, X)
        X = torch.baddbmm(X, X, torch.baddbmm(G, G, G, beta=b, alpha=c), beta=a)
    a, b, c = steps[-1]
    D = torch.bmm(X.mT, X) - torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    # a I + b G + c G² with G = I + D: close to convergence this rounds half as much, D being small.
    P = torch.baddbmm(D, D, D, beta=b + 2 * c, alpha=c)
    return torch.baddbmm(X, X, P, beta=a + b + c), D.square().sum((-1, -2))


def _batch_last(steps: tuple[tuple[float, float, float], ...], X: Tensor) -> tuple[Tensor, Tensor]:
    """The same on X (r, r, n)."""
    for a, b, c in steps[:-1]:
        G = (X[:, :, None] * X[:, None]).sum(0)
        X = torch.add(_product(X, torch.add(b * G, _product(G, G), alpha=c)), X, alpha=a)
    a, b, c = steps[-1]
    D = (X[:, :, None] * X[:, None]).sum(0)
    D.diagonal().sub_(1)
    P = torch.add((b + 2 * c) * D, _product(D, D), alpha=c)
    return torch.add(_product(X, P), X, alpha=a + b + c), D.square().sum((0, 1))


def _product(X: Tensor, Y: Tensor) -> Tensor:
    return (X[:, :, None] * Y).sum(1)


def _generic_matrix(like: Tensor) -> Tensor:
    """A fixed (r, r) matrix of norm about 1 without structure: cosines at multiples of the golden angle."""
    i = torch.arange(like.shape[-1], dtype=torch.float64, device=like.device) + 0.5
    return (torch.cos(2 * math.pi * 0.6180339887498949 * i[:, None] * i) * math.sqrt(2 / len(i))).to(like.dtype)
