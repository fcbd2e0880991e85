"""The part of ``benchmarks.gpu`` that holds the kernels to their bounds: ``python -m benchmarks.gpu_roofline RECORD``.

Times each kernel of each case of ``results/roofline.json`` and puts the bound that was counted on a CPU beside it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedrot_kernels.checks import normalize_weights
from fedrot_kernels.tolerances import PRODUCT_FLOOR
from fedrot_kernels.triton_backend.rotations import rotations
from fedrot_kernels.triton_backend.whole_model import Model

from .bounds import BOUNDS, Row, beside, card_of, lines
from .record import write
from .timing import side_by_side
from .workloads import Adapter, Workload, build, does_not_fit

BUDGET = 0.1


def steps(case: Row, device: torch.device) -> list[Callable[[], object]]:
    """The three launches of a case, in the order of its kernels, on the inputs that were counted."""
    dtype = getattr(torch, case["dtype"])
    inputs = build(workload(case), device, dtype)
    model = Model(*inputs.stacked_factors, inputs.reference_A, None)
    shares = normalize_weights(inputs.weights, case["clients"], device).float()
    M = model.cross_covariance()

    def rotate() -> Any:
        return rotations(
            M,
            model.tables.adapters,
            RP=model.RP,
            leading=model.RP,
            n_clients=model.n_clients,
            joint=False,
            strength=0.5,
            reflections=False,
            floor=PRODUCT_FLOOR[torch.float32],
        )

    R = rotate()[0]
    return [model.cross_covariance, rotate, lambda: (model.rotate_average(R, shares, dtype), inputs)]


def workload(case: Row) -> Workload:
    """The model of a case: adapters of width d on both sides."""
    d = case["d"]
    adapters = tuple(Adapter(f"layer{i}", d, d) for i in range(case["adapters"]))
    return Workload(f"d {d}", adapters, case["rank"], case["clients"])


def main() -> None:
    path, device = Path(sys.argv[1]), torch.device("cuda")
    bounds = json.loads(BOUNDS.read_text("utf-8"))
    card = card_of(torch.cuda.get_device_name(device), list(bounds["cards"]))
    record: Row = {"bounds_of_commit": bounds["environment"]["commit"], "card": card, "rows": [], "skipped": []}
    for case in bounds["cases"]:
        if reason := does_not_fit(workload(case), device, getattr(torch, case["dtype"])):
            record["skipped"].append(reason)
            continue
        calls = {kernel["kernel"]: call for kernel, call in zip(case["kernels"], steps(case, device), strict=True)}
        timings = side_by_side(calls, device, BUDGET, f"{case['dtype']} r {case['rank']} d {case['d']}")
        rows = beside(case, [timing.median for timing in timings.values()], card)
        record["rows"] += rows
        write(path, record)
        print("\n".join(lines(rows)), flush=True)


if __name__ == "__main__":
    main()
