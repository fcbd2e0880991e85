"""Whole-model alignment and averaging in plain PyTorch, without a copy of the inputs.

Small factors are stacked, part by part of the model, in memory that stays in the cache, so that a part takes a few calls
whatever the number of clients; large ones are multiplied where they are. Between the cross-covariances and the averages
all rotations of one rank are found together, because small batches of rotations cost more than reading factors twice.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .procrustes import NOISE, procrustes
from .stacking import Columns, Factors, Rows, parts

_LARGEST_WEIGHT = 2.0**40  # of a client relative to the first


def align_average(
    A: Sequence[Factors],
    B: Sequence[Factors],
    shares: Tensor,
    A_ref: Sequence[Tensor] | None,
    B_ref: Sequence[Tensor] | None,
    strength: float,
    special: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """The fields of ``Aligned``, from arguments that have been checked; shares (N,) in float64."""
    rows, columns = Rows(), Columns()
    if A_ref is not None:
        M = _cross_covariances(A, A_ref, rows, relative=B_ref is not None)
    if B_ref is not None:
        M_B = _cross_covariances(B, B_ref, columns, relative=A_ref is not None)
        M = M_B if A_ref is None else [x + y for x, y in zip(M, M_B, strict=True)]
    R, W, residual = _rotations(M, shares, strength, special)
    mean_A, mean_B, finite = transform_average(A, B, W, W, rows, columns)
    return mean_A, mean_B, R, residual, finite


def transform_average(
    A: Sequence[Factors],
    B: Sequence[Factors],
    W_A: Sequence[Tensor],
    W_B: Sequence[Tensor],
    rows: Rows | None = None,
    columns: Columns | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Σ W_Aᵢᵀ Aᵢ and Σ Bᵢ W_Bᵢ of every adapter, with W (N, r, r) in the working dtype; and whether all are finite."""
    mean_A, finite_A = _averages(A, W_A, (rows or Rows()).averages)
    mean_B, finite_B = _averages(B, W_B, (columns or Columns()).averages)
    return mean_A, mean_B, finite_A & finite_B


def average(tensors: Sequence[Factors], weights: Sequence[float]) -> tuple[list[Tensor], Tensor]:
    """The fields of ``average``, client by client: the bits that a running sum of the same weights gives."""
    unit = next(w for w in weights if w)
    if max(weights) > unit * _LARGEST_WEIGHT:
        unit = max(weights)
    lists = [x.unbind() if isinstance(x, Tensor) else x for x in tensors]
    totals = [torch.zeros(x[0].shape, dtype=_working(x[0].dtype), device=x[0].device) for x in lists]
    for i, weight in enumerate(weights):  # weights of zero too, so that NaN is found
        torch._foreach_add_(totals, [x[i] for x in lists], alpha=weight / unit)
    torch._foreach_div_(totals, sum(w / unit for w in weights))
    means = [total.to(x[0].dtype) for total, x in zip(totals, lists, strict=True)]
    return means, _finite(means)


def _cross_covariances(
    factors: Sequence[Factors], refs: Sequence[Tensor], stack: Rows | Columns, *, relative: bool
) -> list[Tensor]:
    """M (N, r, r) of every adapter; relative to ‖F_ref‖², where a reference that is zero says nothing, and M is zero."""
    M = [refs[0]] * len(factors)
    for part in parts(factors):
        dtype = _working(factors[part[0]][0].dtype)
        F_ref = torch.stack([refs[i] for i in part]) if len(part) > 1 else refs[part[0]][None]
        F_ref = F_ref.to(dtype)
        of_part = stack.products([factors[i] for i in part], F_ref)
        if relative:
            squared = F_ref.flatten(1).square().sum(1)[:, None, None, None]
            of_part = of_part / torch.where(squared == 0, 1, squared)
        for i, x in zip(part, of_part, strict=True):
            M[i] = x
    return M


def _rotations(
    M: Sequence[Tensor], shares: Tensor, strength: float, special: bool
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """R and wᵢRᵢ (N, r, r) of every adapter, and the residuals (L, N)."""
    by_rank: dict[tuple, list[int]] = {}
    for i, x in enumerate(M):
        by_rank.setdefault((x.shape, x.dtype), []).append(i)
    R, W, residual = list(M), list(M), list(M)
    for indices in by_rank.values():
        stacked = torch.stack([M[i] for i in indices])
        of_rank, far = procrustes(stacked, strength=strength, special=special, noise=NOISE[stacked.dtype])
        weighted = of_rank * shares.to(of_rank.dtype)[:, None, None]
        for i, *of_one in zip(indices, of_rank, weighted, far, strict=True):
            R[i], W[i], residual[i] = of_one
    return R, W, torch.stack(residual)


def _averages(
    factors: Sequence[Factors], W: Sequence[Tensor], averages: Callable[[list[Factors], Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The averages of every adapter's factor, and whether they are finite."""
    means, of_parts = list(W), []
    for part in parts(factors):
        weighted = torch.stack([W[i] for i in part]) if len(part) > 1 else W[part[0]][None]
        mean = averages([factors[i] for i in part], weighted).to(factors[part[0]][0].dtype)
        of_parts.append(mean)
        for i, x in zip(part, mean, strict=True):
            means[i] = x.clone() if len(part) > 1 else x
    return means, _finite(of_parts)


def _finite(tensors: Sequence[Tensor]) -> Tensor:
    # Extremes take a tenth of the time of isfinite, and NaN is one.
    extremes = [x for tensor in tensors if tensor.numel() for x in torch.aminmax(tensor)]
    if not extremes:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device)
    return torch.stack(extremes).isfinite().all()


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
