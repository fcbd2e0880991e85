"""What is asked of the kernels on a GPU, beside what was measured."""

from collections.abc import Callable, Iterator
from typing import Any

from .candidates import COPY

Target = dict[str, Any]
SHARE = "slabs: share of the card's copy bandwidth"
PLAIN = "slabs: time relative to the fastest plain averaging"
PUBLISHED = "roberta-large N=50: times faster than the published procedure"
POLAR = "polar: times faster than batched torch.linalg.svd"
HOST = "host time in ms, 4,800 separate tensors"
REQUIRED: dict[str, tuple[str, float]] = {
    SHARE: ("≥", 0.8),
    PLAIN: ("≤", 1.3),
    PUBLISHED: ("≥", 300),
    POLAR: ("≥", 50),
    HOST: ("≤", 3),
}
_MET: dict[str, Callable[[float, float], bool]] = {"≥": float.__ge__, "≤": float.__le__}
_BANDWIDTH_BOUND = {"float32": 16, "bfloat16": 32}  # up to which rank


def targets(kernels: dict[str, Any], comparisons: list[dict[str, Any]]) -> list[Target]:
    """One entry per target and configuration; what could not be measured is missing."""
    found = []
    for name, of, value in _measured(kernels, comparisons):
        relation, bound = REQUIRED[name]
        met = _MET[relation](value, bound)
        found.append({"target": name, "of": of, "required": f"{relation} {bound:g}", "measured": value, "met": met})
    return found


def _measured(kernels: dict[str, Any], comparisons: list[dict[str, Any]]) -> Iterator[tuple[str, str, float]]:
    for comparison in comparisons:
        of, rows = f"{comparison['workload']} {comparison['dtype']}", comparison["rows"]
        if "copy" in kernels and comparison["rank"] <= _BANDWIDTH_BOUND.get(comparison["dtype"], 0):
            for row in ("align_average, slabs", "align_average, slabs, CUDA graph"):
                if row in rows:
                    share = rows[row]["bytes_per_s"] / kernels["copy"]["bytes_per_s"]
                    yield SHARE, of + (", CUDA graph" if "graph" in row else ""), share
        aligned = rows["align_average, slabs"]
        # Without graphs on either side: the same conditions.
        plain = [row["median_s"] for name, row in rows.items() if not row["aligns"] and name != COPY and "graph" not in name]
        yield PLAIN, of, aligned["median_s"] / min(plain)
        if comparison["model"] == "roberta-large" and comparison["clients"] == 50:
            for name in ("align_average, slabs", "fedrot, state dicts"):
                if name in rows and rows[name]["times_faster_than_published"]:
                    yield PUBLISHED, f"{of}, {name}", rows[name]["times_faster_than_published"]
    for row in kernels.get("polar", []):
        yield POLAR, f"r={row['r']} × {row['matrices']}", row["times_faster_than_svd"]
    if "host" in kernels:
        yield HOST, "align_average", kernels["host"]["median_s"] * 1e3


def summary(found: list[Target]) -> str:
    """One line per target: how many configurations meet it, the worst and the best."""
    lines = []
    for name, (relation, bound) in REQUIRED.items():
        entries = sorted((t for t in found if t["target"] == name), key=lambda t: t["measured"], reverse=relation == "≤")
        line = f"{name} {relation} {bound:g}: "
        if entries:
            worst, best = entries[0], entries[-1]
            line += f"{sum(t['met'] for t in entries)} of {len(entries)} met"
            line += f"; worst {worst['measured']:.2f} ({worst['of']}), best {best['measured']:.2f} ({best['of']})"
        else:
            line += "not measured"
        lines.append(line)
    return "\n".join(lines)
