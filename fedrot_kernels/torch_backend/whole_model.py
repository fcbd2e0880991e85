"""Alignment and averaging of a whole model, without a copy of the inputs.

Small factors are stacked, part by part of the model, in memory that stays in the cache, so that a part takes a few calls
whatever the number of clients. Large factors are multiplied where they are. All rotations of one rank are found together,
after all cross-covariances and before all averages, because small batches of rotations cost more than reading factors twice.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import all_finite, normalize_weights, relative_weights
from ..grouping import group_indices
from ..precision import working_dtype
from ..types import Aligned, Clients
from .exact import ExactProducts
from .procrustes import rotations
from .products import relative_to_reference
from .stacking import Columns, Rows, parts


def align_average(
    A: Sequence[Clients],
    B: Sequence[Clients],
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor] | None,
    B_ref: Sequence[Tensor] | None,
    strength: float,
    reflections: bool,
) -> Aligned:
    """Align and average checked factors; see ``dispatch.align_average``."""
    shares = normalize_weights(weights, len(A[0]), A[0][0].device)
    rows, columns = Rows(), Columns()
    M: list[Tensor] = []
    if A_ref is not None:
        M = _cross_covariances(A, A_ref, rows, relative=B_ref is not None)
    if B_ref is not None:
        M_B = _cross_covariances(B, B_ref, columns, relative=A_ref is not None)
        M = [x + y for x, y in zip(M, M_B, strict=True)] if M else M_B
    exact = ExactProducts(A, B, A_ref, B_ref)
    R, W, residual, undetermined = _rotations(M, exact, shares, strength, reflections)
    mean_A, mean_B, finite = weighted_average(A, B, W, rows, columns)
    return Aligned(mean_A, mean_B, R, residual, undetermined, finite)


def weighted_average(
    A: Sequence[Clients],
    B: Sequence[Clients],
    W: Sequence[Tensor],
    rows: Rows | None = None,
    columns: Columns | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Average factors with matrices as weights.

    Args:
        A: per adapter the clients' (r, d_in).
        B: per adapter the clients' (d_out, r).
        W: per adapter wᵢRᵢ, (N, r, r), in the working dtype.
        rows: memory for A.
        columns: memory for B.

    Returns:
        Per adapter Σ WᵢᵀAᵢ and Σ BᵢWᵢ, in the inputs' dtypes; and a bool scalar tensor: all of their entries are finite.
    """
    mean_A, finite_A = _averages(A, W, (rows or Rows()).averages)
    mean_B, finite_B = _averages(B, W, (columns or Columns()).averages)
    return mean_A, mean_B, finite_A & finite_B


def average(tensors: Sequence[Clients], weights: Sequence[float] | Tensor) -> tuple[list[Tensor], Tensor]:
    """Average checked tensors client by client, with the bits of a running sum of the same weights."""
    relative, total = relative_weights(weights, len(tensors[0]))
    lists = [x.unbind() if isinstance(x, Tensor) else x for x in tensors]
    totals = [torch.zeros(x[0].shape, dtype=working_dtype(x[0]), device=x[0].device) for x in lists]
    for i, weight in enumerate(relative):  # also weights of zero, so that NaN is found
        torch._foreach_add_(totals, [x[i] for x in lists], alpha=weight)
    torch._foreach_div_(totals, total)
    means = [total.to(x[0].dtype) for total, x in zip(totals, lists, strict=True)]
    return means, all_finite(means)


def _cross_covariances(
    factors: Sequence[Clients], refs: Sequence[Tensor], stack: Rows | Columns, *, relative: bool
) -> list[Tensor]:
    """M (N, r, r) of every adapter, divided by ‖F_ref‖² if relative."""
    M = [refs[0]] * len(factors)
    for part in parts(factors):
        dtype = working_dtype(factors[part[0]][0])
        F_ref = torch.stack([refs[i] for i in part]) if len(part) > 1 else refs[part[0]][None]
        F_ref = F_ref.to(dtype)
        products = stack.products([factors[i] for i in part], F_ref)
        if relative:
            products = relative_to_reference(products, F_ref.flatten(1).square().sum(1)[:, None, None, None])
        for i, x in zip(part, products, strict=True):
            M[i] = x
    return M


def _rotations(
    M: Sequence[Tensor],
    exact: ExactProducts,
    shares: Tensor,
    strength: float,
    reflections: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """R and wᵢRᵢ (N, r, r) of every adapter, the residuals and the numbers of undetermined directions (L, N).

    ``exact`` computes M in float64 where that matters.
    """
    R, W, residual, undetermined = list(M), list(M), list(M), list(M)
    for indices in group_indices((x.shape, x.dtype, floor) for x, floor in zip(M, exact.floors, strict=True)):
        stacked, n = torch.stack([M[i] for i in indices]), len(shares)

        def exact_ones(flat: Tensor, indices: list[int] = indices, n: int = n) -> Tensor:
            return torch.stack([exact(indices[i // n], i % n) for i in flat.tolist()])

        floor = exact.floors[indices[0]]
        found = rotations(stacked, exact_ones, strength=strength, reflections=reflections, floor=floor)
        weighted = found.R * shares.to(found.R.dtype)[:, None, None]
        for i, *results in zip(indices, *found, weighted, strict=True):
            R[i], residual[i], undetermined[i], W[i] = results
    return R, W, torch.stack(residual), torch.stack(undetermined)


def _averages(
    factors: Sequence[Clients], W: Sequence[Tensor], average_part: Callable[[list[Clients], Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The average of every adapter's factor, and whether all are finite."""
    means, averaged = list(W), []
    for part in parts(factors):
        weighted = torch.stack([W[i] for i in part]) if len(part) > 1 else W[part[0]][None]
        mean = average_part([factors[i] for i in part], weighted).to(factors[part[0]][0].dtype)
        averaged.append(mean)
        for i, x in zip(part, mean, strict=True):
            means[i] = x.clone() if len(part) > 1 else x
    return means, all_finite(averaged)
