"""Comparisons for people: a table in text and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .candidates import COPY, DICTIONARY_LOOP

HEADER = (
    "time ms",
    "quartiles",
    "wall ms",
    "published ÷ time",
    "time ÷ loop",
    "GB/s",
    "of copy",
    "peak MB",
)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["quartiles_s"]
    faster, peak = row["times_faster_than_published"], row["peak_bytes_above_inputs"]
    return (
        f"{row['median_s'] * 1e3:.3f}",
        f"{low * 1e3:.3f}–{high * 1e3:.3f}",
        f"{row['wall_median_s'] * 1e3:.3f}",
        "" if faster is None else f"{faster:.1f}",
        f"{row['ratio_to_dictionary_loop']:.2f}",
        f"{row['bytes_per_s'] / 1e9:.2f}",
        f"{row['share_of_copy']:.0%}",
        "" if peak is None else f"{peak / 1e6:.1f}",
    )


def text_table(comparison: dict[str, Any]) -> str:
    """The rows of one comparison; peak memory is above the inputs, the result included."""
    lines = [("", *HEADER), *((name, *_cells(row)) for name, row in comparison["rows"].items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    title = (
        f"{comparison['workload']}, {comparison['adapters']} adapters, {comparison['dtype']}, λ = {comparison['strength']}: "
        f"inputs {comparison['input_bytes'] / 1e6:.1f} MB, result {comparison['output_bytes'] / 1e6:.1f} MB"
    )
    if (bound := comparison["limits"]) is not None:
        loop = comparison["rows"][DICTIONARY_LOOP]["median_s"]
        title += (
            f"\nlimits over the loop: memory {bound['memory_s'] / loop:.2f} ({bound['read_bytes_per_s'] / 1e9:.1f} GB/s), "
            f"multiply-adds {bound['arithmetic_s'] / loop:.2f} ({bound['multiply_adds_per_s'] / 1e9:.0f} G/s)"
        )
    failures = [f"{name}: no CUDA graph, {why}" for name, why in comparison["not_captured"].items()]
    return "\n".join([title, *text, *failures, ""])


def plot(comparisons: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """One panel per comparison: median times with quartiles on a logarithmic axis, and the copy as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(comparisons))
    lines = -(-len(comparisons) // columns)
    tallest = max(len(c["rows"]) for c in comparisons)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(6.5 * columns, (0.25 * tallest + 1) * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(comparisons) :]:
        axis.set_visible(False)
    for axis, comparison in zip(axes.flat[: len(comparisons)], comparisons, strict=True):
        rows = comparison["rows"]
        times = [row["median_s"] * 1e3 for row in rows.values()]
        spread = [
            [t - row["quartiles_s"][0] * 1e3 for t, row in zip(times, rows.values(), strict=True)],
            [row["quartiles_s"][1] * 1e3 - t for t, row in zip(times, rows.values(), strict=True)],
        ]
        colours = ["tab:blue" if row["aligns"] else "tab:grey" for row in rows.values()]
        axis.barh(list(rows), times, xerr=spread, color=colours)
        axis.axvline(rows[COPY]["median_s"] * 1e3, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.invert_yaxis()
        axis.set_xlabel("ms (blue: aligned, grey: not)")
        axis.set_title(f"{comparison['workload']}, {comparison['dtype']}", fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
