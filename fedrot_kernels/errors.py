"""Aggregation errors of whole models, measured: by the compiled library or by PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_adapters, firsts, normalize_weights
from .dispatch import use_native
from .grouping import group_indices
from .measures import aggregation_error
from .precision import full_precision, working_dtype
from .types import Backend, Clients, Factors

_ENTRIES = 1 << 19  # of factors that PyTorch copies at a time


@full_precision
def measure_errors(
    A: Factors,
    B: Factors,
    R: Sequence[Tensor] | None,
    weights: Sequence[float] | Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Measure what averaging the factors of L adapters from N clients loses. At most one synchronisation with a device.

    Args:
        A: per adapter (N, r, d_in), or a sequence of N tensors (r, d_in), as in ``align_average``.
        B: per adapter (N, d_out, r), or a sequence of N tensors (d_out, r).
        R: per adapter the rotations (N, r, r), or None if nothing was rotated.
        weights: as in ``align_average``.
        backend: as in ``align_average``.

    Returns:
        (L, 3) float64 on the CPU: ‖Σ wᵢBᵢAᵢ − B̄Ā‖_F with Ā = Σ wᵢRᵢᵀAᵢ and B̄ = Σ wᵢBᵢRᵢ, ‖Σ wᵢBᵢAᵢ‖_F, and the first
        without rotations.

        Let ΔA be what remains of A's rotated or of its plain factors without their mean, whichever is less, and eps that of
        the working dtype. A squared error is off by at most a few eps · (Σ wᵢ‖ΔBᵢ‖‖ΔAᵢ‖)², and an error by what the rounding
        of factors and rotations moves it: a few eps · ‖B̄‖‖Ā‖.

    Raises:
        ValueError: shapes or weights that do not fit, by the adapter's index.
        TypeError: tensors that are not floating-point.
    """
    n = check_adapters(A, B, None, None)
    first_A, first_B = firsts(A), firsts(B)
    if R is not None:
        for i, (a, x) in enumerate(zip(first_A, R, strict=True)):
            if x.shape != (expected := (n, a.shape[0], a.shape[0])):
                raise ValueError(f"adapter {i}: expected rotations {expected}, got {tuple(x.shape)}")
    if not use_native(backend, first_A, max(a.shape[0] for a in first_A)):
        return _by_torch(A, B, R, weights)
    from .native_backend.errors import measure_errors as native  # not at the top: it imports the torch backend

    fitting = [i for i, (a, b) in enumerate(zip(first_A, first_B, strict=True)) if _fits(n, a.shape, b.shape[0])]
    errors, rest = torch.zeros(len(A), 3, dtype=torch.float64, device="cpu"), set(range(len(A))) - {*fitting}
    if fitting:
        chosen = (A, B, R) if len(fitting) == len(A) else _chosen(A, B, R, fitting)
        errors[fitting], left = native(*chosen, weights)
        if left:
            left = [fitting[i] for i in left]
            errors[left] = _by_torch(*_chosen(A, B, R, left), weights, torch.float64)
    if rest:
        errors[sorted(rest)] = _by_torch(*_chosen(A, B, R, sorted(rest)), weights)
    return errors


def _fits(n: int, shape: torch.Size, d_out: int) -> bool:
    """Whether Gram matrices of (n + 1) r rows take fewer products than the matrices E that they stand for."""
    r, d_in = shape
    return (n + 1) * r * (d_in + d_out) <= 4 * d_in * d_out


def _chosen(
    A: Factors, B: Factors, R: Sequence[Tensor] | None, chosen: list[int]
) -> tuple[Factors, Factors, list[Tensor] | None]:
    """These adapters' factors and rotations."""
    return [A[i] for i in chosen], [B[i] for i in chosen], None if R is None else [R[i] for i in chosen]


def _by_torch(
    A: Factors,
    B: Factors,
    R: Sequence[Tensor] | None,
    weights: Sequence[float] | Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``measure_errors``, some adapters of equal shape at a time, in their working dtype or the one given."""
    w = normalize_weights(weights, len(A[0]), A[0][0].device)
    indices: list[int] = []
    columns: list[Tensor] = []
    for group in group_indices((a.shape, b.shape, a.dtype) for a, b in zip(firsts(A), firsts(B), strict=True)):
        (r, d_in), d_out = A[group[0]][0].shape, B[group[0]][0].shape[0]
        size = max(1, _ENTRIES // (len(w) * r * (d_in + d_out)))
        for start in range(0, len(group), size):
            part = group[start : start + size]
            indices += part
            a, b = (_stacked([factors[i] for i in part], dtype) for factors in (A, B))
            error, norm = aggregation_error(a, b, w)
            values = [error, norm, error]
            if R is not None:
                rotations = torch.stack([R[i] for i in part]).to(a)
                values[0] = aggregation_error(rotations.mT @ a, b @ rotations, w)[0]
            columns.append(torch.stack(values))
    found = torch.cat(columns, dim=1).T.cpu()
    return torch.empty_like(found).index_copy_(0, torch.tensor(indices, device="cpu"), found)


def _stacked(part: Sequence[Clients], dtype: torch.dtype | None) -> Tensor:
    """Stack one factor of G adapters from N clients, (G, N, …), in working precision."""
    S = torch.stack([x for per_client in part for x in per_client]).detach()
    return S.to(dtype or working_dtype(S)).view(len(part), -1, *S.shape[1:])
