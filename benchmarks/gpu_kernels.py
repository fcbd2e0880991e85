"""The part of ``benchmarks.gpu`` that times the operations one by one: ``python -m benchmarks.gpu_kernels RECORD``."""

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fedrot_kernels as fk

from .record import write
from .timing import side_by_side
from .workloads import WORKLOADS, build

DEVICE = torch.device("cuda")
BUDGET = 0.2
RANKS, BATCHES = (4, 8, 16, 32, 64, 128), (480, 2400)
# Beyond r = 32 cuSOLVER takes one matrix after the other, so fewer tell the time per matrix, without minutes of waiting.
SVD_AT_A_TIME, SVD_MATRICES = 32, 48
FACTORS = [(50, 48, 4, 1024), (32, 64, 8, 4096), (32, 64, 16, 4096), (10, 64, 32, 4096), (4, 64, 64, 4096)]  # N, L, r, d


def copy_bandwidth() -> dict[str, Any]:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    timing = side_by_side({"copy": lambda: target.copy_(source)}, DEVICE, BUDGET, "copy")["copy"]
    return {**timing.record(), "bytes_per_s": 2 * source.numel() / timing.median}


def polar(r: int, matrices: int) -> dict[str, Any]:
    """polar and procrustes against torch.linalg.svd, per matrix."""
    generator = torch.Generator(DEVICE).manual_seed(r)
    M = torch.eye(r, device=DEVICE) + 0.4 * torch.randn(matrices, r, r, device=DEVICE, generator=generator) / r**0.5
    in_svd = matrices if r <= SVD_AT_A_TIME else SVD_MATRICES
    calls = {
        "polar": lambda: fk.polar(M),
        "procrustes": lambda: fk.procrustes(M, strength=0.5, reflections=True),
        "svd": lambda: torch.linalg.svd(M[:in_svd]),
    }
    timings = side_by_side(calls, DEVICE, BUDGET, f"polar r={r} × {matrices}")
    faster = timings["svd"].median / in_svd / (timings["polar"].median / matrices)
    rows = {name: timing.record() for name, timing in timings.items()}
    return {"r": r, "matrices": matrices, "matrices_in_svd": in_svd, "times_faster_than_svd": faster, **rows}


def products(N: int, L: int, r: int, d: int, dtype: torch.dtype, copy: float) -> dict[str, Any]:
    """cross_covariance and rotate_average of N clients' L factors, with their bandwidth."""
    generator = torch.Generator(DEVICE).manual_seed(r)
    F = torch.randn(N, L, r, d, device=DEVICE, generator=generator).to(dtype)
    F_ref = F[0].clone()
    R = fk.polar(fk.cross_covariance(F, F_ref))
    weights = torch.ones(N, device=DEVICE)
    calls = {
        "cross_covariance": lambda: fk.cross_covariance(F, F_ref),
        "rotate_average": lambda: fk.rotate_average(F, R, weights),
    }
    # rotate_average of tensors hands on float32.
    moved = {"cross_covariance": F.nbytes + F_ref.nbytes, "rotate_average": F.nbytes + F_ref.numel() * 4}
    timings = side_by_side(calls, DEVICE, BUDGET, f"products {N}×{L}×{r}×{d} {str(dtype)[6:]}")
    result: dict[str, Any] = {"N": N, "L": L, "r": r, "d": d, "dtype": str(dtype)[6:]}
    for name, timing in timings.items():
        bandwidth = moved[name] / timing.median
        result[name] = {**timing.record(), "bytes_per_s": bandwidth, "share_of_copy": bandwidth / copy}
    return result


def host_time() -> dict[str, Any]:
    """The time until align_average of 4,800 separate tensors returns, the device idle before: roberta-large, N = 50."""
    workload = WORKLOADS["roberta-large"][-1]
    inputs = build(workload, DEVICE, torch.float32)
    weights = torch.tensor(inputs.weights, device=DEVICE)
    times = []
    for _ in range(35):
        # Lists of their own, as a caller has them who has just received the updates.
        A, B = inputs.factors(inputs.separate)
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = fk.align_average(A, B, weights, A_ref=inputs.reference_A, strength=0.5)
        times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        del result
    times = times[5:]
    return {"tensors": 2 * len(workload.adapters) * workload.clients, "median_s": median(times), "max_s": max(times)}


def main() -> None:
    path = Path(sys.argv[1])
    record: dict[str, Any] = {"copy": copy_bandwidth(), "polar": [], "products": []}
    print(f"copy: {record['copy']['bytes_per_s'] / 1e9:.0f} GB/s", flush=True)
    write(path, record)
    record["host"] = host_time()
    print(f"host: {record['host']['median_s'] * 1e3:.2f} ms for {record['host']['tensors']} tensors", flush=True)
    write(path, record)
    for r in RANKS:
        for matrices in BATCHES:
            row = polar(r, matrices)
            record["polar"].append(row)
            write(path, record)
            times = ", ".join(f"{name} {row[name]['median_s'] * 1e3:.3f} ms" for name in ("polar", "procrustes", "svd"))
            print(
                f"polar r={r} × {matrices}: {times} of {row['matrices_in_svd']}, "
                f"{row['times_faster_than_svd']:.0f} × faster than the SVD",
                flush=True,
            )
    for shape in FACTORS:
        for dtype in (torch.float32, torch.bfloat16):
            row = products(*shape, dtype, record["copy"]["bytes_per_s"])
            record["products"].append(row)
            write(path, record)
            for name in ("cross_covariance", "rotate_average"):
                timing = f"{row[name]['median_s'] * 1e3:.3f} ms, {row[name]['share_of_copy']:.0%} of the copy"
                print(f"{name} {shape} {row['dtype']}: {timing}", flush=True)


if __name__ == "__main__":
    main()
