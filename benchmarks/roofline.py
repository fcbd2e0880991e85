"""What bounds the kernels on an H100 and an H200, counted on a CPU: ``python -m benchmarks.roofline``.

Executes every kernel as it is compiled for sm_90, counts what it does, and divides by what a card can do. Needs g++ and no
GPU. Writes ``results/roofline.json``, a plot, and the table in ``docs/kernels.md``.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fedrot_kernels.triton_backend.launch import interpreted
from tests.kernels.executor import why_not

from .bounds import BOUNDS
from .cards import CARDS
from .compile_matrix import sources_digest
from .record import RESULTS, ROOT, environment, write
from .roofline_counts import Case, Counted, count
from .roofline_plot import plot

PAGE = ROOT / "docs" / "kernels.md"
_BETWEEN = "<!-- roofline -->\n", "<!-- end of roofline -->\n"
_KERNELS = ("cross_covariance", "polar", "rotate_average")
CASES = tuple(
    Case(getattr(torch, dtype), rank, d, clients, 48 if d == 1024 else 64)  # roberta-large's and llama-qv's adapters
    for d in (1024, 4096)
    for dtype, rank, clients in (
        ("float32", 4, 10),
        ("float32", 16, 10),
        ("bfloat16", 16, 10),
        ("bfloat16", 32, 10),
        ("bfloat16", 64, 10),
        ("bfloat16", 128, 3),
    )
)


def measure(case: Case) -> dict[str, Any]:
    """One entry of the record: its kernels' bounds, and their sum over the bytes that must move, for each card."""
    must = case.workload.aligned_bytes(case.dtype)
    row: dict[str, Any] = {"dtype": str(case.dtype).removeprefix("torch."), "rank": case.rank, "d": case.d}
    row |= {"clients": case.clients, "adapters": case.adapters, "bytes": must}
    counted = count(case)
    on = {name: [_bound(kernel, name) for kernel in counted] for name in CARDS}
    first = next(iter(CARDS))
    ratios = {name: sum(k["bound_us"] for k in on[name]) / (must / CARDS[name].memory * 1e6) for name in CARDS}
    row |= {"bound_over_bytes": ratios[first], "bound_over_bytes_by_card": ratios}
    row["kernels"] = [
        _description(kernel) | bound | {"by_card": {name: on[name][i] for name in CARDS}}
        for i, (kernel, bound) in enumerate(zip(counted, on[first], strict=True))
    ]
    return row


def _bound(kernel: Counted, card: str) -> dict[str, Any]:
    times = {name: seconds * 1e6 for name, seconds in kernel.times(CARDS[card]).items()}
    bound_by = max(times, key=times.__getitem__)
    one_warp = kernel.one_warp(CARDS[card]) * 1e6
    return {"bound_us": times[bound_by], "bound_by": bound_by, "us": times, "one_warp_us": one_warp}


def _description(kernel: Counted) -> dict[str, Any]:
    resident = CARDS["H100"].resident(kernel.registers, kernel.warps, kernel.shared)
    return asdict(kernel) | {"kernel": kernel.kernel, "resident_ctas": resident, "resident_warps": resident * kernel.warps}


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per case; the time of each kernel's bound on an H100, and what binds it."""
    heads = ["", *_KERNELS, "all over the bytes that must move: H100, H200"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for case in cases:
        cells = [f"{case['dtype']} r {case['rank']}, d {case['d']}, N {case['clients']}"]
        for k in case["kernels"]:
            chain = f", one warp {k['one_warp_us']:.0f}" if k["one_warp_us"] > k["bound_us"] else ""
            cells.append(f"{k['bound_us']:.1f} µs {k['bound_by']}{chain}")
        cells.append(", ".join(f"{ratio:.2f}" for ratio in case["bound_over_bytes_by_card"].values()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(page: str, cases: Sequence[dict[str, Any]]) -> str:
    """The page with the table between its two marks."""
    before, rest = page.split(_BETWEEN[0])
    return before + _BETWEEN[0] + "\n" + table(cases) + "\n" + _BETWEEN[1] + rest.split(_BETWEEN[1])[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results (default: %(default)s)")
    output = parser.parse_args().output
    if reason := why_not():
        sys.exit(f"benchmarks.roofline executes kernels on the CPU: {reason}")
    if interpreted():
        parser.error("TRITON_INTERPRET is set: kernels made for the interpreter cannot be compiled; unset it")
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    cases = [measure(case) for case in tqdm(CASES, desc="counting", disable=None)]
    where = environment(torch.device("cpu"))
    cards = {name: asdict(card) for name, card in CARDS.items()}
    write(output / BOUNDS.name, {"environment": where, "sources": sources_digest(), "cards": cards, "cases": cases})
    print(table(cases))
    if output == RESULTS:
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), cases), "utf-8")
    plot(cases, (PAGE.parent / "images" if output == RESULTS else output) / "roofline.png")


if __name__ == "__main__":
    main()
