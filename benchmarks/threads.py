"""An aggregation on one and on more threads of a CPU, and its memory: ``python -m benchmarks.threads``."""

import argparse
import os
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import fedrot

from .limits import measured
from .memory import peak_above
from .record import RESULTS, environment, record_path, write
from .timing import stopwatch
from .workloads import WORKLOADS, Inputs, Workload, build

CPU = torch.device("cpu")
_ROUNDS = 5  # timed in a turn
MACHINE = ("read_bytes_per_s", "multiply_adds_per_s")  # what more threads can gain at all


def aggregated(inputs: Inputs) -> fedrot.AggregationResult:
    """A round with the default report."""
    return fedrot.aggregate(inputs.separate, inputs.weights, inputs.reference, align_on="A", strength=0.5)


def compare(workload: Workload, threads: list[int], turns: int) -> dict[str, Any]:
    """Median wall times per number of threads, in turns; whether all results have the same bits; and the peak memory.

    A turn is of several rounds, of which the first is not timed: where the number of threads has just changed, PyTorch makes
    threads anew.
    """
    inputs, watch = build(workload, CPU, torch.float32), stopwatch(CPU)
    times: dict[int, list[float]] = {n: [] for n in threads}
    first, same = None, True
    for _ in tqdm(range(turns), desc=workload.label, leave=False, disable=None):
        for n, seconds in times.items():
            torch.set_num_threads(n)
            found = aggregated(inputs).state_dict
            first = first or found
            same &= all(torch.equal(x, found[key]) for key, x in first.items())
            del found
            seconds += [watch.wall(lambda: aggregated(inputs)) for _ in range(_ROUNDS)]
    del first
    peak = peak_above(lambda: aggregated(inputs), CPU)
    result, given = workload.update_bytes(torch.float32), (workload.clients + 1) * workload.update_bytes(torch.float32)
    return {
        "workload": workload.label,
        "wall_median_s": {n: median(seconds) for n, seconds in times.items()},
        "same_bits": same,
        "inputs_and_result_bytes": given + result,
        "peak_above_them_bytes": None if peak is None else peak - result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["roberta-large", "llama-qv"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the record")
    arguments = parser.parse_args()
    where = environment(CPU)
    record: dict[str, Any] = {"environment": where, "load_average": os.getloadavg()[0], "cores": os.cpu_count(), "rows": []}
    record["machine"] = {n: dict(zip(MACHINE, measured(CPU, n), strict=True)) for n in arguments.threads}
    for n, found in record["machine"].items():
        print(f"{n} threads: " + ", ".join(f"{name} {x / 1e9:.1f}e9" for name, x in found.items()))
    path = record_path("threads", where, arguments.output)
    for workload in (workload for name in arguments.workload for workload in WORKLOADS[name]):
        row = compare(workload, arguments.threads, arguments.turns)
        record["rows"].append(row)
        write(path, record)
        first, *others = row["wall_median_s"].values()
        faster = ", ".join(f"{first / x:.2f} × on {n}" for n, x in zip(arguments.threads[1:], others, strict=True))
        above = row["peak_above_them_bytes"]
        memory = "not known" if above is None else f"{above / row['inputs_and_result_bytes']:+.1%}"
        bits = "the same bits" if row["same_bits"] else "OTHER BITS"
        tqdm.write(f"{row['workload']}: {first * 1e3:.2f} ms on {arguments.threads[0]}, {faster}; {bits}; memory {memory}")
    print(path)


if __name__ == "__main__":
    main()
