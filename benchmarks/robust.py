"""What robust rules cost beside plain averaging and the exact report: ``python -m benchmarks.robust``.

Ratios are of processor times on a CPU: medians of calls in turns. What a rule adds is its call's time less that of the same
aggregation without it; so is what the exact report adds.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

import fedrot

from .baselines import dictionary_loop
from .record import RESULTS, environment, record_path, write
from .timing import Call, side_by_side
from .workloads import WORKLOADS, build

LOOP, NONE, EXACT = "dictionary loop", "no report", "exact report"
RULES = {
    "multi-krum": {"robust": "multi-krum", "byzantine": 0},
    "geometric-median": {"robust": "geometric-median"},
    "clip": {"clip": 1e6},
}


def main() -> None:
    """Measure every workload, print a table, and write a record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robust", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["roberta-large"])
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per candidate")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the record")
    arguments = parser.parse_args()
    where = environment(arguments.device)
    record = {"environment": where, "workloads": {}}
    for workload in (w for name in arguments.workload for w in WORKLOADS[name]):
        inputs = build(workload, arguments.device, torch.float32)

        def aggregate(inputs=inputs, **options: object) -> Call:
            given = {"strength": 0.5, "report_error": False} | options
            return partial(fedrot.aggregate, inputs.separate, inputs.weights, inputs.reference, **given)

        calls = {LOOP: partial(dictionary_loop, inputs.separate, inputs.weights), NONE: aggregate()}
        calls |= {EXACT: aggregate(report_error=True)} | {name: aggregate(**options) for name, options in RULES.items()}
        timings = side_by_side(calls, arguments.device, arguments.budget, workload.label)
        record["workloads"][workload.label] = {name: timing.record() for name, timing in timings.items()}
        loop, plain = timings[LOOP].time, timings[NONE].time
        print(f"{workload.label}: dictionary loop {1e3 * loop:.1f} ms, fedrot without a report {1e3 * plain:.1f} ms")
        for name in (EXACT, *RULES):
            total, added = timings[name].time, timings[name].time - plain
            beside = added / (timings[EXACT].time - plain)
            print(
                f"  {name:18} {total / loop:5.2f} × the loop, adds {1e3 * added:7.1f} ms, {beside:4.2f} × the exact report"
            )
    path = record_path("robust", where, arguments.output)
    write(path, record)
    print(path)


if __name__ == "__main__":
    main()
