"""What bounds an aggregation on a CPU: the memory's bandwidth and the processor's multiply-adds, both measured."""

from collections.abc import Callable
from functools import cache

import torch

from .timing import stopwatch
from .workloads import Workload

_READ = 2**28  # bytes, more than any cache holds
_SQUARE = 1024


@cache
def measured(device: torch.device, threads: int) -> tuple[float, float]:
    """Bytes read a second, and float32 multiply-adds a second, each the best of several, on as many threads of a CPU."""
    torch.set_num_threads(threads)
    x = torch.ones(_READ // 4, device=device)
    M = torch.rand(_SQUARE, _SQUARE, device=device)
    return _READ / _best(device, x.sum), _SQUARE**3 / _best(device, lambda: M @ M)


def _best(device: torch.device, call: Callable[[], object]) -> float:
    watch = stopwatch(device)
    return min(watch.wall(call) for _ in range(10))


def limits(workload: Workload, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The least time of aligning on A and averaging: of reading every factor once, and of its multiply-adds.

    A client's cross-covariance takes r² d_in multiply-adds, and its rotated sums r² (d_in + d_out).
    """
    read, multiplied = measured(device, torch.get_num_threads())
    A, B = workload.elements
    work = workload.clients * workload.rank * (2 * A + B)
    return {
        "read_bytes_per_s": read,
        "multiply_adds_per_s": multiplied,
        "memory_s": workload.clients * workload.update_bytes(dtype) / read,
        "arithmetic_s": work / multiplied,
    }
