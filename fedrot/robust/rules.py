"""Rules that tell from distances alone which clients count: Krum, multi-Krum and the geometric median.

All arithmetic is float64 on the CPU, on N × N numbers. Equal scores go to the client that came first.
"""

import torch
from torch import Tensor

from ..errors import UpdateError
from ..options import KRUM, AggregationOptions

_STEPS, _CONVERGED = 1000, 1e-12  # Weiszfeld's iteration: how many at most, and the change of a weight at which it ends
_SMOOTHING = 1e-6  # of the usual distance; below it a client counts as the median itself (arXiv 1912.13445)


def least_clients(options: AggregationOptions) -> int:
    """The smallest number of clients of positive weight that the rule takes: 2f + 3 for Krum, f = 0 if it is not set."""
    return 2 * (options.byzantine or 0) + 3 if options.robust in KRUM else 1


def check_clients(options: AggregationOptions, n: int) -> int | None:
    """Check that Krum has enough clients.

    Args:
        options: the options.
        n: the number of clients of positive weight.

    Returns:
        f, the largest that n clients allow if it is not set; None for rules without it.

    Raises:
        UpdateError: fewer than 2f + 3 clients.
    """
    if options.robust not in KRUM:
        return None
    if n < (needed := least_clients(options)):
        cure = (
            "lower byzantine, or take robust='geometric-median'" if options.byzantine else "take robust='geometric-median'"
        )
        raise UpdateError(
            f"robust={options.robust!r} needs at least 2f + 3 = {needed} clients of positive weight for byzantine f = "
            f"{options.byzantine or 0}, and has {n}; {cure}"
        )
    return (n - 3) // 2 if options.byzantine is None else options.byzantine


def krum_scores(squares: Tensor, f: int) -> Tensor:
    """Sum each client's N − f − 2 smallest squared distances to others (Blanchard et al., NeurIPS 2017).

    Args:
        squares: (N, N), squared distances.
        f: the number of attackers that the scores withstand, N ≥ 2f + 3.

    Returns:
        (N,).
    """
    n = len(squares)
    others = squares.masked_select(~torch.eye(n, dtype=torch.bool, device="cpu")).view(n, n - 1)
    return others.sort(dim=1).values[:, : n - f - 2].sum(1)


def nearest(scores: Tensor, count: int) -> list[int]:
    """The places of the clients with the smallest scores, in the clients' order; of equal scores the first."""
    return sorted(scores.argsort(stable=True)[:count].tolist())


def usual_square(squares: Tensor) -> float:
    """The median over clients of the median squared distance to others (N, N), which less than half of them cannot move.

    Of an even number of clients it is the lower median.
    """
    n = len(squares)
    if n < 2:
        return 0.0
    others = squares.masked_select(~torch.eye(n, dtype=torch.bool, device="cpu")).view(n, n - 1)
    return float(others.median(dim=1).values.median())


def median_weights(squares: Tensor, shares: Tensor) -> Tensor:
    """Find λ, Σ λᵢ = 1, for which Σ λᵢxᵢ is the geometric median of the xᵢ: the z that minimises Σ wᵢ‖xᵢ − z‖.

    Weiszfeld's iteration λᵢ ∝ wᵢ/‖xᵢ − z‖, smoothed, in terms of distances: ‖xᵢ − z‖² = Σⱼ λⱼD²ᵢⱼ − ½ Σⱼₖ λⱼλₖD²ⱼₖ.

    Args:
        squares: (N, N), squared distances.
        shares: (N,), the clients' weights wᵢ, positive and summing to 1.

    Returns:
        (N,).
    """
    smallest = _SMOOTHING * usual_square(squares) ** 0.5
    weights = shares
    for _ in range(_STEPS):
        to_all = squares @ weights
        distances = (to_all - weights @ to_all / 2).clamp(min=0).sqrt().clamp(min=smallest)
        if not bool((distances > 0).all()):
            return shares  # most clients are one, and each of them the median
        found = shares / distances
        found = found / found.sum()
        if float((found - weights).abs().max()) < _CONVERGED:
            return found
        weights = found
    return weights
