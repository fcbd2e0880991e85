"""Whole aggregations against what they replace, one table per workload: ``python -m benchmarks.aggregation``.

Every time is the median of candidates measured in turns in one run, so ratios hold whatever else the machine does.
Bandwidth counts the bytes that must move, for aligning on A or for averaging; the copy moves as many as aligning does.
"""

import argparse
import os
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .candidates import PUBLISHED, WITHOUT_FEDROT
from .compare import compare
from .record import RESULTS, environment, record_path, write
from .tables import plot, text_table
from .workloads import WORKLOADS, does_not_fit

BUDGET = {"cpu": 1.5, "cuda": 0.1}  # seconds per candidate
QUICK_BUDGET = 0.05
# PyTorch's threads wait for each other. With another process on the cores that costs a time slice per operation: on two
# cores the published procedure once took 6.7 s instead of 20 ms, while what runs in one thread took as long as ever.
BUSY = 0.5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="default: all")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    parser.add_argument("--strength", type=float, default=0.5, help="λ of everything that aligns; below 1 two SVDs, not one")
    parser.add_argument("--quick", action="store_true", help="a few adapters and clients, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the record and the plot")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    device = arguments.device
    where = environment(device)
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    path = record_path("quick" if arguments.quick else "aggregation", where, arguments.output)
    configuration = {key: str(value) for key, value in vars(arguments).items() if key != "output"}
    record: dict[str, Any] = {"environment": where, "configuration": configuration, "skipped": [], "comparisons": []}

    def skip(reason: str) -> None:
        tqdm.write(reason)
        record["skipped"].append(reason)

    load = record["load_average_before"] = os.getloadavg()[0]
    if device.type == "cpu" and load > BUSY:
        print(f"Load average {load:.1f}: others are at work, and times and ratios mean little.", flush=True)
    if WITHOUT_FEDROT:
        skip(WITHOUT_FEDROT)
    workloads = [workload for name in arguments.workload for workload in WORKLOADS[name]]
    if arguments.quick:
        workloads = list(dict.fromkeys(workload.shrunk() for workload in workloads))
    budget = QUICK_BUDGET if arguments.quick else BUDGET[device.type]
    for name, workload in tqdm(list(product(arguments.dtype, workloads)), desc="workloads", disable=None):
        dtype = getattr(torch, name)
        if reason := does_not_fit(workload, device, dtype):
            skip(reason)
            continue
        without: tuple[str, ...] = ()
        if name != arguments.dtype[0]:
            without = (PUBLISHED,)
            skip(f"{workload.label} {name}: without the published procedure, whose SVDs are those of {arguments.dtype[0]}")
        comparison = compare(workload, device, dtype, arguments.strength, budget, without)
        tqdm.write(text_table(comparison))
        record["comparisons"].append(comparison)
        write(path, record)
    if record["comparisons"]:
        plot(record["comparisons"], f"{where['device']}, torch {where['torch']}", path.with_suffix(".png"))
        print(f"{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
