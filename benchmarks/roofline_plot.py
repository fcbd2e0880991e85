"""The plot of ``benchmarks.roofline``: each case's bound in parts of the time that its bytes take."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COLORS = {"cross_covariance": "#4878a8", "polar": "#d1603d", "polar_blocked": "#d1603d", "rotate_average": "#6a9f58"}


def plot(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Stack the kernels' bounds on an H100 over the time of the bytes that must move."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(cases) + 1.2), layout="constrained")
    labels = [f"{c['dtype']} r {c['rank']}, d {c['d']}, N {c['clients']}" for c in cases]
    for y, case in enumerate(cases):
        unit = sum(k["bound_us"] for k in case["kernels"]) / case["bound_over_bytes"]
        left = 0.0
        for k in case["kernels"]:
            width = k["bound_us"] / unit
            axes.barh(y, width, left=left, color=_COLORS[k["kernel"]])
            left += width
        axes.text(left, y, f" {left:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(cases)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("bound on an H100, in units of the time that the bytes that must move take")
    names = ("cross_covariance", "polar", "rotate_average")
    axes.legend([pyplot.Rectangle((0, 0), 1, 1, color=_COLORS[name]) for name in names], names, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
