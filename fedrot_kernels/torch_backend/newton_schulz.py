"""The Newton–Schulz iteration on batches of small matrices: the same few steps for all, whatever the others hold."""

import torch
from torch import Tensor

from ..schedule import CLASSIC, SHORT, Step
from ..tolerances import CONVERGED

# On a CPU, large batches of matrices up to this rank are quicker as sums over the whole batch than with torch.bmm: half
# the time at r = 4.
_ELEMENTWISE_RANK, _ELEMENTWISE_BATCH = 4, 256


def newton_schulz(X: Tensor) -> tuple[Tensor, Tensor]:
    """Drive every singular value of X (n, r, r), all at most 1, to 1 by the short stage of the schedule.

    Returns:
        (n, r, r), and the indices of the matrices that have not converged. Condition numbers up to about 100 always
        converge; finite matrices of condition numbers over 1000 never do. NaN counts as converged, because no further step
        mends it.
    """
    steps = (*SHORT, CLASSIC) if X.dtype == torch.float64 else SHORT
    if X.shape[-1] <= _ELEMENTWISE_RANK and len(X) >= _ELEMENTWISE_BATCH and X.device.type == "cpu":
        X, squares = _batch_last(steps, X.permute(1, 2, 0).contiguous())
        X = X.permute(2, 0, 1).contiguous()
    else:
        X, squares = _batch_first(steps, X)
    return X, (squares > CONVERGED[X.dtype] ** 2).nonzero().squeeze(-1)


def _batch_first(steps: tuple[Step, ...], X: Tensor) -> tuple[Tensor, Tensor]:
    """X ← X (a I + b G + c G²) for every step, on X (n, r, r).

    Returns:
        (n, r, r), and ‖XᵀX − I‖_F² (n,) before the last step.
    """
    for a, b, c in steps[:-1]:
        G = torch.bmm(X.mT, X)
        X = torch.baddbmm(X, X, torch.baddbmm(G, G, G, beta=b, alpha=c), beta=a)
    a, b, c = steps[-1]
    D = torch.bmm(X.mT, X) - torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    # a I + b G + c G² with G = I + D: close to convergence this rounds half as much, because D is small.
    P = torch.baddbmm(D, D, D, beta=b + 2 * c, alpha=c)
    return torch.baddbmm(X, X, P, beta=a + b + c), D.square().sum((-1, -2))


def _batch_last(steps: tuple[Step, ...], X: Tensor) -> tuple[Tensor, Tensor]:
    """``_batch_first`` with the batch as the last dimension: X (r, r, n)."""
    for a, b, c in steps[:-1]:
        G = (X[:, :, None] * X[:, None]).sum(0)
        X = torch.add(_product(X, torch.add(b * G, _product(G, G), alpha=c)), X, alpha=a)
    a, b, c = steps[-1]
    D = (X[:, :, None] * X[:, None]).sum(0)
    D.diagonal().sub_(1)
    P = torch.add((b + 2 * c) * D, _product(D, D), alpha=c)
    return torch.add(_product(X, P), X, alpha=a + b + c), D.square().sum((0, 1))


def _product(X: Tensor, Y: Tensor) -> Tensor:
    """X Y of X and Y (r, r, n)."""
    return (X[:, :, None] * Y).sum(1)
