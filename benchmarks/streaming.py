"""Thousands of clients added one by one, beside a running average of dictionaries: ``python -m benchmarks.streaming``."""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from tqdm import tqdm

from fedrot import FedRotAggregator

from .memory import peak_above
from .record import RESULTS, environment, record_path, write
from .workloads import WORKLOADS, Inputs, StateDict, build

CPU = torch.device("cpu")
PLAIN = "dictionary average"
OPTIONS: dict[str, dict[str, Any]] = {
    "fedit": {"method": "fedit", "report_error": False},
    "fedit, error estimated": {"method": "fedit"},
    "fedrot": {"report_error": False},
    "fedrot, error estimated": {},
}
_POOL = 8  # updates that are mixed two at a time


class DictionaryAverage:
    """The running average of a federated training loop, key by key."""

    def __init__(self) -> None:
        self.sums: StateDict = {}
        self.total = 0.0

    def add(self, update: StateDict, weight: float) -> None:
        if not self.sums:
            self.sums = {key: torch.zeros_like(x) for key, x in update.items()}
        for key, x in update.items():
            self.sums[key].add_(x, alpha=weight)
        self.total += weight


def clients(inputs: Inputs, count: int) -> Iterator[tuple[StateDict, float]]:
    """Updates that no two clients share, each in memory of its own, as if it had just been received."""
    keys = list(inputs.reference)
    shapes = [inputs.reference[key].shape for key in keys]
    pool = [torch.cat([update[key].flatten() for key in keys]) for update in inputs.separate]
    for i in range(count):
        a, b = pool[i % len(pool)], pool[(i // len(pool) + 1) % len(pool)]
        received = torch.lerp(a, b, (i % 101) / 101)
        parts = received.split([shape.numel() for shape in shapes])
        yield {key: x.view(shape) for key, x, shape in zip(keys, parts, shapes, strict=True)}, 100.0 + 37 * i % 101


def side_by_side(inputs: Inputs, count: int) -> dict[str, Any]:
    """Every candidate's time for each of the same clients, in turns; only ``add`` is timed.

    Ratios and rates are of processor time, which does not count what else the machine does meanwhile.
    """

    def begin() -> dict[str, Any]:
        fresh = {name: FedRotAggregator(inputs.reference, round=1, **options) for name, options in OPTIONS.items()}
        return {PLAIN: DictionaryAverage(), **fresh}

    for update, weight in clients(inputs, 3):  # loads libraries
        for candidate in begin().values():
            candidate.add(update, weight)
    candidates = begin()
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    busy: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for i, (update, weight) in enumerate(tqdm(clients(inputs, count), desc="in turns", total=count, disable=None)):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start, start_busy = time.perf_counter(), time.process_time()
            candidates[name].add(update, weight)
            busy[name].append(time.process_time() - start_busy)
            wall[name].append(time.perf_counter() - start)
    rows: dict[str, dict[str, Any]] = {}
    size = inputs.workload.update_bytes(torch.float32)
    for name in names:
        low, middle, high = quantiles(busy[name], n=4, method="inclusive")
        rows[name] = {
            "processor_median_s": middle,
            "processor_quartiles_s": [low, high],
            "wall_median_s": median(wall[name]),
            "clients_per_s": count / sum(busy[name]),
            "gigabytes_per_s": size * count / sum(busy[name]) / 1e9,
        }
    for row in rows.values():
        row["ratio_to_plain"] = row["processor_median_s"] / rows[PLAIN]["processor_median_s"]
    return rows


def memory(inputs: Inputs, count: int, receiver: Callable[[], Any], label: str) -> dict[str, Any]:
    """The most resident memory while clients are streamed and aggregated, above that of the process and one update."""

    def stream(count: int) -> None:
        aggregator = receiver()
        for update, weight in tqdm(clients(inputs, count), desc=label, total=count, leave=False, disable=None):
            aggregator.add(update, weight)
        if isinstance(aggregator, FedRotAggregator):
            aggregator.finish()

    stream(3)  # loads libraries
    update, found = inputs.workload.update_bytes(torch.float32), peak_above(lambda: stream(count), CPU)
    return {"clients": count, "peak_above_one_update_bytes": None if found is None else found - update}


def accuracy(inputs: Inputs) -> dict[str, float]:
    """The estimated error beside the exact one, of a few clients."""
    stream, at_once = (FedRotAggregator(inputs.reference, round=1) for _ in range(2))
    for update, weight in zip(inputs.separate, inputs.weights, strict=True):
        stream.add(update, weight)
    estimated, exact = stream.finish().report, at_once.aggregate(inputs.separate, inputs.weights).report
    assert estimated.error is not None and exact.error is not None and estimated.deviation is not None
    misses = [e.error / x.error - 1 for e, x in zip(estimated.adapters, exact.adapters, strict=True)]  # type: ignore
    return {
        "clients": len(inputs.separate),
        "relative_miss": estimated.error / exact.error - 1,
        "relative_deviation": estimated.deviation / exact.error,
        "root_mean_square_miss_of_an_adapter": math.sqrt(sum(m * m for m in misses) / len(misses)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="roberta-large")
    parser.add_argument("--clients", type=int, default=10000)
    parser.add_argument("--quick", action="store_true", help="a part of the model and few clients, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the record")
    arguments = parser.parse_args()
    workload, count = replace(WORKLOADS[arguments.workload][0], clients=_POOL), arguments.clients
    if arguments.quick:
        workload, count = replace(workload.shrunk(), clients=_POOL), min(count, 50)
    inputs, where = build(workload, CPU, torch.float32), environment(CPU)
    path = record_path("streaming", where, arguments.output)
    record: dict[str, Any] = {"environment": where, "load_average": os.getloadavg()[0]}
    record |= {"workload": replace(workload, clients=count).label, "update_bytes": workload.update_bytes(torch.float32)}
    record["rows"] = side_by_side(inputs, count)
    write(path, record)
    for name, receiver in {PLAIN: DictionaryAverage, "fedrot, error estimated": lambda: _fedrot(inputs)}.items():
        label = f"memory, {name}"
        record[label] = [memory(inputs, n, receiver, label) for n in (count // 10, count)]
        write(path, record)
    record["accuracy of the estimated error"] = accuracy(inputs)
    write(path, record)
    print(f"{record['workload']}, {record['update_bytes'] / 1e6:.2f} MB an update")
    for name, row in record["rows"].items():
        print(
            f"  {name:<24} {row['processor_median_s'] * 1e3:>7.2f} ms  {row['clients_per_s']:>6.0f} clients/s  "
            f"{row['gigabytes_per_s']:>5.2f} GB/s  {row['ratio_to_plain']:>5.2f} × {PLAIN}"
        )
    for label in (label for label in record if label.startswith("memory")):
        for found in record[label]:
            if found["peak_above_one_update_bytes"] is not None:
                print(f"  {label}: {found['clients']} clients, {found['peak_above_one_update_bytes'] / 1e6:.1f} MB")
    print(f"  {record['accuracy of the estimated error']}")
    print(path)


def _fedrot(inputs: Inputs) -> FedRotAggregator:
    return FedRotAggregator(inputs.reference, round=1)


if __name__ == "__main__":
    main()
