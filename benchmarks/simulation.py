"""Local training of all clients in one pass against one client at a time: ``python -m benchmarks.simulation``.

Both train the same clients from the same adapter on the same batches, in turns in one run. One client at a time is ordinary
PEFT training: PEFT's model, PyTorch's optimizer, the model's own loss. Aggregation is not measured. Evaluation, which is the
same for both, is measured beside them.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from fedrot.simulation import SimulationConfig, Task, load_task
from fedrot.simulation.clients import Clients

from .record import RESULTS, environment, record_path, write
from .simulation_cases import CASES, Case, one_at_a_time, one_pass
from .timing import side_by_side

BUDGET = 10.0  # seconds per candidate
BUSY = 0.5
HEADER = ("clients", "batch", "rounds/s", "one at a time", "times faster", "target", "evaluation s")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--encoder", type=Path, help="folder of a sequence classifier's or encoder's weights, such as MiniLM"
    )
    parser.add_argument("--texts", type=Path, help="TSV with the columns sentence and label, such as SST-2's")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the record")
    arguments = parser.parse_args()
    if (arguments.encoder is None) != (arguments.texts is None):
        parser.error("--encoder and --texts go together")
    return arguments


def configure(case: Case, arguments: argparse.Namespace) -> SimulationConfig:
    """Configure the simulation of a case."""
    options: dict[str, Any] = {
        "clients": case.clients,
        "batch_size": case.batch,
        "partition": "iid",
        "device": arguments.device,
    }
    options["local_steps"] = 2 if arguments.quick else case.steps
    if case.texts:
        examples = {"max_train_examples": 4000, "max_test_examples": 200}
        options |= {"model": str(arguments.encoder), "dataset": str(arguments.texts), "lr": 1e-3, **examples}
    return SimulationConfig(**options)


def compare(case: Case, task: Task, config: SimulationConfig, budget: float) -> dict[str, Any]:
    """Time a round's training, both ways, and an evaluation."""
    clients = Clients(task, config)
    start = clients.state()
    calls = {
        "one pass": lambda: one_pass(clients, start),
        "one at a time": lambda: one_at_a_time(clients, start),
        "evaluation": lambda: clients.evaluate(start),
    }
    timings = side_by_side(calls, clients.device, budget, case.label)
    return {
        "case": case.label,
        "clients": case.clients,
        "batch": case.batch,
        "local_steps": config.local_steps,
        "times": {name: timing.record() for name, timing in timings.items()},
        "times_faster": timings["one at a time"].median / timings["one pass"].median,
        "target": case.target,
        "load_average": os.getloadavg()[0],
    }


def row(comparison: dict[str, Any]) -> tuple[str, ...]:
    """Format a comparison as a row of the table."""
    times = {name: record["median_s"] for name, record in comparison["times"].items()}
    return (
        comparison["case"],
        str(comparison["clients"]),
        str(comparison["batch"]),
        f"{1 / times['one pass']:.2f}",
        f"{1 / times['one at a time']:.2f}",
        f"{comparison['times_faster']:.2f}",
        f"{comparison['target']:.1f}",
        f"{times['evaluation']:.2f}",
    )


def text_table(comparisons: list[dict[str, Any]]) -> str:
    """Tabulate the cases: rounds of local training per second, their ratio, and seconds of an evaluation."""
    lines = [("", *HEADER), *map(row, comparisons)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def main() -> None:
    """Measure all cases, write the record and print the table."""
    arguments = parse()
    where = environment(torch.device(arguments.device))
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    path = record_path("simulation-quick" if arguments.quick else "simulation", where, arguments.output)
    load = os.getloadavg()[0]
    if arguments.device == "cpu" and load > BUSY:
        print(f"Load average {load:.1f}: others are at work, and times mean little.", flush=True)
    record: dict[str, Any] = {"environment": where, "load_average_before": load, "skipped": [], "comparisons": []}
    tasks: dict[bool, Task] = {}
    for case in CASES:
        if case.texts and arguments.encoder is None:
            record["skipped"].append(f"{case.label}, {case.clients} clients: needs --encoder and --texts")
            continue
        config = configure(case, arguments)
        if case.texts not in tasks:
            tasks[case.texts] = load_task(config)
        record["comparisons"].append(compare(case, tasks[case.texts], config, 0.2 if arguments.quick else BUDGET))
        write(path, record)
    print("\n".join([text_table(record["comparisons"]), *record["skipped"], str(path)]))


if __name__ == "__main__":
    main()
