"""The plots of one run: its score and its error by round, and the geometry of its alignment."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from .config import SimulationConfig
from .metrics import shown_measures
from .panels import Y_LABELS, draw_line, finish_figure, fit_magnitudes, line_styles, make_panels

_PLAIN = {"label": "plain average of the same updates", "color": "grey", "linestyle": ":", "marker": ""}
_GEOMETRY = {  # a row of panels each, for A and for B
    "removed": "part of squared distance\nthat rotation removes",
    "turn_per_distance": "‖Rᵢ − I‖ / ‖Fᵢ − F_ref‖\nmean; largest (thin)",
    "smallest_relative_distance": "smallest\n‖Fᵢ − F_ref‖ / ‖F_ref‖",
}


def plot_run(metrics: list[dict[str, Any]], config: SimulationConfig, path: Path) -> Figure:
    """Plot one run: the score and, if it was measured, the relative aggregation error by round.

    Beside the error stands that of the plain average of the same updates.

    Args:
        metrics: a row per round, counted from 1.
        config: the run's configuration.
        path: the PNG to write.

    Returns:
        The figure.
    """
    rows = pd.DataFrame(metrics)
    rows = rows.assign(x=rows["round"])
    measures, (style,) = shown_measures(rows), line_styles(rows).values()
    figure, axes = make_panels(len(measures), 1, height=2.6)
    for axis, measure in zip(axes.flat, measures, strict=True):
        draw_line(axis, rows, measure, style)
        if measure == "relative_error":
            draw_line(axis, rows, "plain_relative_error", _PLAIN)
        axis.set_ylabel(Y_LABELS[measure])
        if measure != "loss":
            axis.set_ylim(0, None if measure == "relative_error" else 1)
    axes[0, 0].set_title(f"{config.start} start")
    return finish_figure(figure, axes, "round", path)


def plot_geometry(rows: pd.DataFrame, path: Path) -> Figure:
    """Plot the quantities of the paper's analysis by round, for A and for B, and the aggregation error beside its bound.

    Args:
        rows: a row per run and round, with method, round, aggregation_error and what ``alignment_geometry`` returns.
            Several seeds are averaged; several starts have lines of their own.
        path: the PNG to write.

    Returns:
        The figure.
    """
    if "start" in rows and rows["start"].nunique() > 1:
        rows = rows.assign(method=rows["method"] + ", " + rows["start"] + " start")
    error = pd.to_numeric(rows["aggregation_error"]).where(rows["error_bound"] > 0)  # the others' is rounding
    rows = rows.assign(x=rows["round"], aggregation_error=error, ratio=error / rows["error_bound"])
    figure, axes = make_panels(len(_GEOMETRY) + 1, 2, height=2.2)
    for method, style in line_styles(rows).items():
        group, thin = rows[rows["method"] == method], style | {"label": "_", "marker": "", "linewidth": 0.8}
        for column, factor in enumerate("AB"):
            for axis, name in zip(axes[:-1, column], _GEOMETRY, strict=True):
                draw_line(axis, group, f"{name}_{factor}", style)
                draw_line(axis, group, f"{name}_{factor}_max", thin)
        draw_line(axes[-1, 0], group, "aggregation_error", style)
        draw_line(axes[-1, 0], group, "error_bound", thin)
        draw_line(axes[-1, 1], group, "ratio", style)
    for axis in axes.flat:
        fit_magnitudes(axis)
    for axis, label in zip(axes[:, 0], [*_GEOMETRY.values(), "aggregation error;\nits bound (thin)"], strict=True):
        axis.set_ylabel(label)
    axes[-1, 1].set(ylabel="error / bound", yscale="linear", ylim=(0, 1))
    axes[0, 0].set_title("F = A")
    axes[0, 1].set_title("F = Bᵀ")
    return finish_figure(figure, axes, "round", path)
