"""What is asked of the clients' factors and weights before anything is computed."""

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

Clients = Tensor | Sequence[Tensor]  # one tensor of every client: (N, …), or N × (…)


def numbers(weights: Sequence[float] | Tensor, n: int) -> list[float]:
    """The weights as n numbers that can be averaged with."""
    values = weights.tolist() if isinstance(weights, Tensor) else [float(w) for w in weights]
    if len(values) != n or not all(math.isfinite(w) and w >= 0 for w in values) or not any(values):
        raise ValueError(f"weights must be {n} finite numbers, non-negative and not all zero, got {values}")
    return values


def normalised(weights: Sequence[float] | Tensor, n: int, device: torch.device) -> Tensor:
    """(n,) float64 on the device, summing to 1."""
    if isinstance(weights, Tensor) and weights.device.type != "cpu":
        if weights.shape != (n,):
            raise ValueError(f"expected one weight per client, ({n},), got {tuple(weights.shape)}")
        values = weights.to(device, torch.float64)
    else:
        values = torch.tensor(numbers(weights, n), dtype=torch.float64)
    values = values / values.amax()  # so that the sum cannot overflow
    values = values / values.sum()
    if values.device.type == "cpu" and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def check_adapters(
    A: Sequence[Clients], B: Sequence[Clients], A_ref: Sequence[Tensor] | None, B_ref: Sequence[Tensor] | None
) -> int:
    """N, once everything fits; ValueError or TypeError else."""
    lengths = [len(x) for x in (A, B, A_ref, B_ref) if x is not None]
    if len(lengths) < 3:
        raise ValueError("pass A_ref, B_ref or both: what to align to")
    if len(set(lengths)) > 1 or not lengths[0] or not len(A[0]):
        raise ValueError(f"A, B and the references must have one entry per adapter, and at least one client; got {lengths}")
    n = len(A[0])
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        check_clients(a, n, f"adapter {i}, A", A[0][0].device)
        check_clients(b, n, f"adapter {i}, B", A[0][0].device)
        (A0, B0), shapes = (a[0], b[0]), f"A {tuple(a[0].shape)} and B {tuple(b[0].shape)}"
        if A0.dim() != 2 or B0.dim() != 2 or A0.shape[0] != B0.shape[1] or not A0.numel() or not B0.numel():
            raise ValueError(f"adapter {i}: expected (r, d_in) and (d_out, r) per client, got {shapes}")
        if A0.dtype != B0.dtype:
            raise ValueError(f"adapter {i}: A is {A0.dtype} and B {B0.dtype}; both must have one dtype")
        for name, refs, x in (("A_ref", A_ref, A0), ("B_ref", B_ref, B0)):
            if refs is not None and refs[i].shape != x.shape:
                raise ValueError(f"adapter {i}: {name} is {tuple(refs[i].shape)}, but the clients have {tuple(x.shape)}")
    return n


def check_clients(of_clients: Clients, n: int, name: str, device: torch.device) -> None:
    """Raise unless this is n clients' tensors of one shape, dtype and device."""
    if len(of_clients) != n:
        raise ValueError(f"{name}: {len(of_clients)} clients, but {n} in the first")
    first = of_clients[0]
    if not first.is_floating_point():
        raise TypeError(f"{name}: expected floating-point tensors, got {first.dtype}")
    kinds = {_kind(first)} if isinstance(of_clients, Tensor) else {*map(_kind, of_clients)}
    if kinds == {(first.shape, first.dtype, device)}:
        return
    shapes, dtypes, devices = ({kind[i] for kind in kinds} for i in range(3))
    if len(shapes) > 1:
        raise ValueError(f"{name}: clients of the shapes {' and '.join(str(tuple(s)) for s in shapes)}")
    if len(dtypes) > 1:
        raise ValueError(f"{name}: clients of the dtypes {' and '.join(map(str, dtypes))}")
    raise ValueError(f"{name}: on {' and '.join(map(str, devices))}, the first on {device}; move them to one device")


_kind = attrgetter("shape", "dtype", "device")
