"""Time of a round's replies in FedRot and in Flower's own FedAvg, decoding included: ``python -m benchmarks.flower``."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from tqdm import tqdm

from fedrot.flower import FedRot, to_arrays

from .record import RESULTS, environment, record_path, write
from .timing import side_by_side
from .workloads import WORKLOADS, Inputs, Workload, build

PLAIN = "Flower's FedAvg"
STRATEGIES: dict[str, Callable[[], FedAvg]] = {
    PLAIN: FedAvg,
    "FedRot, fedit": lambda: FedRot(method="fedit", report_error=False),
    "FedRot": lambda: FedRot(report_error=False),
    "FedRot with estimated errors": FedRot,
    "FedRot with exact errors": lambda: FedRot(report_error=True),
}
_BUDGET = 3.0  # seconds per candidate


class _Nodes:
    """The part of Flower's Grid that a strategy needs before it sends."""

    def __init__(self, count: int):
        self.count = count

    def get_node_ids(self) -> list[int]:
        return list(range(2, 2 + self.count))


def aggregation(strategy: FedAvg, inputs: Inputs) -> Callable[[], object]:
    """Make a call that aggregates a round's replies."""
    sent = to_arrays(inputs.reference)
    messages = list(strategy.configure_train(1, sent, ConfigRecord(), _Nodes(len(inputs.separate))))  # type: ignore[arg-type]
    replies = [
        Message(
            RecordDict({"arrays": to_arrays(update), "metrics": MetricRecord({"num-examples": weight})}), reply_to=message
        )
        for message, update, weight in zip(messages, inputs.separate, inputs.weights, strict=True)
    ]
    assert all(message.metadata.message_type == MessageType.TRAIN for message in messages)
    return lambda: strategy.aggregate_train(1, replies)


def measure(workload: Workload) -> dict[str, Any]:
    """Time every strategy on one workload."""
    inputs = build(workload, torch.device("cpu"), torch.float32)
    calls = {name: aggregation(make(), inputs) for name, make in STRATEGIES.items()}
    timings = side_by_side(calls, torch.device("cpu"), _BUDGET, workload.label)
    plain = timings[PLAIN].time
    rows = {name: {**t.record(), "ratio_to_fedavg": t.time / plain} for name, t in timings.items()}
    return {"workload": workload.label, "rows": rows}


def main() -> None:
    """Time the strategies on some workloads, and record it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flower", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["roberta-large", "llama-qv"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the record")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    where = environment(torch.device("cpu"))
    path = record_path("flower", where, arguments.output)
    record: dict[str, Any] = {"environment": where, "workloads": arguments.workload, "comparisons": []}
    for workload in tqdm([w for name in arguments.workload for w in WORKLOADS[name]], desc="workloads", disable=None):
        comparison = measure(workload)
        record["comparisons"].append(comparison)
        tqdm.write(comparison["workload"])
        for name, row in comparison["rows"].items():
            tqdm.write(f"  {name:<30} {row['median_s'] * 1e3:>9.1f} ms  {row['ratio_to_fedavg']:>5.2f} × FedAvg")
        write(path, record)
    print(path)


if __name__ == "__main__":
    main()
