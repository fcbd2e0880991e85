"""Checks of factors, weights and options before anything is computed, and of results after."""

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from .native_backend.columns import TensorColumns
from .native_backend.tensors import read_tensors
from .tolerances import WEIGHT_RANGE
from .types import Clients, Factors

_MOST_FITTING = 8  # signatures that are kept


def read_weights(weights: Sequence[float] | Tensor, n: int) -> list[float]:
    """The weights as numbers.

    Raises:
        ValueError: not n finite numbers, non-negative and not all zero.
    """
    values: list[float] = weights.tolist() if isinstance(weights, Tensor) else [float(w) for w in weights]
    if len(values) != n or not all(math.isfinite(w) and w >= 0 for w in values) or not any(values):
        raise ValueError(f"weights must be {n} finite numbers, non-negative and not all zero, got {values}")
    return values


def relative_weights(weights: Sequence[float] | Tensor, n: int) -> tuple[list[float], float]:
    """The weights in the unit of the first positive one, as a running sum has them, and their sum.

    Raises:
        ValueError: see ``read_weights``.
    """
    given = read_weights(weights, n)
    unit = next(w for w in given if w)
    if max(given) > unit * WEIGHT_RANGE:
        unit = max(given)
    return [w / unit for w in given], sum(w / unit for w in given)


def normalize_weights(weights: Sequence[float] | Tensor, n: int, device: torch.device) -> Tensor:
    """The weights as (n,) float64 on the device, summing to 1.

    Weights on a GPU are not read, because that would wait for the device; only their number is checked.

    Raises:
        ValueError: weights that cannot be averaged with.
    """
    if isinstance(weights, Tensor) and weights.device.type != "cpu":
        if weights.shape != (n,):
            raise ValueError(f"expected one weight per client, ({n},), got {tuple(weights.shape)}")
        values = weights.to(device, torch.float64)
    else:
        values = torch.tensor(read_weights(weights, n), dtype=torch.float64, device="cpu")
    values = values / values.amax()  # so that the sum cannot overflow
    values = values / values.sum()
    if values.device.type == "cpu" and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def check_strength(strength: float) -> None:
    """Raise ValueError unless λ is in [0, 1]."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")


def check_square(**matrices: Tensor) -> None:
    """Raise ValueError unless the matrices are (..., r, r)."""
    for name, x in matrices.items():
        if x.dim() < 2 or x.shape[-1] != x.shape[-2]:
            raise ValueError(f"{name} must have shape (..., r, r), got {tuple(x.shape)}")


def check_frames(F: Tensor, F_ref: Tensor) -> None:
    """Raise ValueError unless both are frames (..., r, d) of one r and d."""
    if F.dim() < 2 or F_ref.dim() < 2 or F.shape[-2:] != F_ref.shape[-2:]:
        raise ValueError(f"F and F_ref must both end in (r, d), got {tuple(F.shape)} and {tuple(F_ref.shape)}")


def firsts(factors: Factors) -> list[Tensor]:
    """The first client's factor of every adapter."""
    return factors.firsts if isinstance(factors, TensorColumns) else [clients[0] for clients in factors]


def count_clients(factors: Factors) -> int:
    """N, the number of the first adapter's clients."""
    return factors.clients if isinstance(factors, TensorColumns) else len(factors[0])


def check_adapters(A: Factors, B: Factors, A_ref: Sequence[Tensor] | None, B_ref: Sequence[Tensor] | None) -> int:
    """Check that adapters, clients and references fit each other.

    Returns:
        N, the number of clients.

    Raises:
        ValueError: numbers, shapes, dtypes or devices that do not fit, by the adapter's index.
        TypeError: tensors that are not floating-point.
    """
    lengths = [len(x) for x in (A, B, A_ref, B_ref) if x is not None]
    if len(set(lengths)) > 1 or not lengths[0] or not count_clients(A):
        raise ValueError(f"A, B and the references must have one entry per adapter, and at least one client; got {lengths}")
    n = count_clients(A)
    kinds = common_kinds(A, n), common_kinds(B, n), *(kinds_of(refs) for refs in (A_ref, B_ref))
    if kinds in _fitting:
        return n
    for i, (A0, B0) in enumerate(zip(firsts(A), firsts(B), strict=True)):
        if kinds[0] is None or kinds[1] is None:
            check_clients(A[i], n, f"adapter {i}, A", A[0][0].device)
            check_clients(B[i], n, f"adapter {i}, B", A[0][0].device)
        if A0.dim() != 2 or B0.dim() != 2 or A0.shape[0] != B0.shape[1] or not A0.numel() or not B0.numel():
            shapes = f"A {tuple(A0.shape)} and B {tuple(B0.shape)}"
            raise ValueError(f"adapter {i}: expected (r, d_in) and (d_out, r) per client, got {shapes}")
        if A0.dtype != B0.dtype:
            raise ValueError(f"adapter {i}: A is {A0.dtype} and B {B0.dtype}; both must have one dtype")
        for name, refs, x in (("A_ref", A_ref, A0), ("B_ref", B_ref, B0)):
            if refs is not None and refs[i].shape != x.shape:
                raise ValueError(f"adapter {i}: {name} is {tuple(refs[i].shape)}, but the clients have {tuple(x.shape)}")
    if None not in kinds:
        while len(_fitting) >= _MOST_FITTING:
            _fitting.pop(next(iter([*_fitting]), ()), None)  # which another thread may have done
        _fitting[kinds] = None
    return n


_fitting: dict[tuple[bytes | None, ...], None] = {}
"""The kinds of factors and references that were found to fit each other."""


def common_kinds(factors: Factors, n: int) -> bytes | None:
    """The kinds that the factors of n clients have; None unless all are sure to be contiguous, on a CPU, floating-point, and
    alike per adapter."""
    if isinstance(factors, TensorColumns):
        return factors.kinds if factors.clients == n and factors.are_plain() else None
    if any(isinstance(clients, Tensor) or len(clients) != n for clients in factors):
        return None
    table = read_tensors([x for clients in factors for x in clients])
    return table.choose_kinds(range(0, len(table), n)) if table is not None and all(table.describe(n)) else None


def kinds_of(tensors: Sequence[Tensor] | None) -> bytes | None:
    """The kinds of tensors, none of no tensors; None if they cannot be read."""
    table = None if tensors is None else read_tensors(tensors)
    return b"" if tensors is None else None if table is None else table.kinds


def check_clients(clients: Clients, n: int, name: str, device: torch.device) -> None:
    """Raise ValueError or TypeError unless there are n clients' tensors of one floating-point dtype, shape and device."""
    if len(clients) != n:
        raise ValueError(f"{name}: {len(clients)} clients, but {n} in the first")
    first = clients[0]
    if not first.is_floating_point():
        raise TypeError(f"{name}: expected floating-point tensors, got {first.dtype}")
    kinds = {_kind(first)} if isinstance(clients, Tensor) else {*map(_kind, clients)}
    if kinds == {(first.shape, first.dtype, device)}:
        return
    shapes, dtypes, devices = ({kind[i] for kind in kinds} for i in range(3))
    if len(shapes) > 1:
        raise ValueError(f"{name}: clients of the shapes {' and '.join(str(tuple(s)) for s in shapes)}")
    if len(dtypes) > 1:
        raise ValueError(f"{name}: clients of the dtypes {' and '.join(map(str, dtypes))}")
    raise ValueError(f"{name}: on {' and '.join(map(str, devices))}, the first on {device}; move them to one device")


_kind = attrgetter("shape", "dtype", "device")


def find_zeros(tensors: Sequence[Tensor]) -> list[int]:
    """The places of floating-point tensors that are zero in every entry. At most two synchronisations with a device.

    Where the compiled library is not there, those whose first row is zero are looked at as a whole.
    """
    table = read_tensors(tensors)
    if table is not None and table.describe(1)[1]:
        return table.find_zeros()
    places, rows = list(range(len(tensors))), [x[0] for x in tensors]
    for looked_at in (rows, tensors):
        norms = torch._foreach_norm([looked_at[i] for i in places], math.inf)
        zero = (torch.stack([norm.double() for norm in norms]) == 0).tolist()
        places = [i for i, is_zero in zip(places, zero, strict=True) if is_zero]
        if not places:
            break
    return places


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """A bool scalar tensor: whether tensors of one device hold no NaN and no Inf.

    Where the compiled library is not there, it looks at the smallest and largest entries, which are NaN if any entry is: a
    tenth of the time of ``isfinite``.

    Args:
        tensors: at least one; empty tensors count as finite.
    """
    table = read_tensors(tensors)
    if table is not None and table.describe(1)[1]:
        return torch.tensor(table.is_finite(), device="cpu")
    extremes = [x for tensor in tensors if tensor.numel() for x in torch.aminmax(tensor)]
    if not extremes:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device)
    return torch.stack(extremes).isfinite().all()
