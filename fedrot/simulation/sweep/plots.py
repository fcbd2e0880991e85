"""The plots of a comparison: methods by round, and the end of every run against a field that was varied."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..metrics import shown_measures
from ..panels import Y_LABELS, Style, draw_line, finish_figure, line_styles, make_panels, mean_over_seeds

Draw = Callable[[Axes, pd.DataFrame, str, Style], None]

_FIELDS = {
    "strength": "strength λ",
    "dirichlet_alpha": "Dirichlet α",
    "lora.r": "rank r",
    "clients": "clients N",
    "lr": "learning rate",
}


def plot_comparison(rows: pd.DataFrame, path: Path) -> Figure:
    """Plot the score and, if it was measured, the relative error by round: a line per method, panels per start.

    Lines are means over seeds, in a band of one standard deviation.

    Args:
        rows: a row per run and round, with start, method, seed, round (from 1), a score and relative_error.
        path: the PNG to write.

    Returns:
        The figure.
    """
    figure, axes = _by_start(rows.assign(x=rows["round"]), draw_line)
    if shown_measures(rows)[0] != "loss":
        axes[0, 0].set_ylim(0, 1)
    return finish_figure(figure, axes, "round", path)


def plot_sweep(rows: pd.DataFrame, field: str, path: Path) -> Figure:
    """Plot the score and the relative error at the end of every run against a field of the configuration that was varied.

    Points are means over seeds, bars one standard deviation. Numbers over more than one decade lie on a logarithmic axis,
    on which 0 has its place.

    Args:
        rows: as for ``plot_comparison``, with a column of the field's name; each run's last round counts.
        field: its values are numbers, or else are taken as names.
        path: the PNG to write.

    Returns:
        The figure.
    """
    runs = rows.groupby(["start", "method", field, "seed"], sort=False, dropna=False)
    last = rows[rows["round"] == runs["round"].transform("max")]
    numeric = pd.api.types.is_numeric_dtype(rows[field]) and not pd.api.types.is_bool_dtype(rows[field])
    values = sorted(rows[field].dropna().unique()) if numeric else list(dict.fromkeys(rows[field].map(str)))
    last = last.assign(x=last[field] if numeric else last[field].map(str).map(values.index))
    figure, axes = _by_start(last, _draw_bars)
    for axis in axes.flat:
        if numeric:
            _place_numbers(axis, values)
        else:
            axis.set_xticks(range(len(values)), values)
    return finish_figure(figure, axes, _FIELDS.get(field, field), path)


def _by_start(rows: pd.DataFrame, draw: Draw) -> tuple[Figure, np.ndarray]:
    """Draw the measures below each other against column x, a column of panels per start.

    More than three starts go into bands below each other, so that a page's width shows them.
    """
    measures, styles = shown_measures(rows), line_styles(rows)
    starts = list(dict.fromkeys(rows["start"]))
    bands = -(-len(starts) // 3)
    columns = -(-len(starts) // bands)
    figure, axes = make_panels(len(measures) * bands, columns, height=2.6)
    panels = axes.reshape(bands, len(measures), columns).swapaxes(1, 2).reshape(-1, len(measures))
    for number, column in enumerate(panels):
        if number >= len(starts):
            for axis in column:
                axis.set_visible(False)
            continue
        for axis, first, measure in zip(column, panels[0], measures, strict=True):
            if number:
                axis.sharey(first)
            for method, group in rows[rows["start"] == starts[number]].groupby("method", sort=False):
                draw(axis, group, measure, styles[method])
            axis.tick_params(labelleft=number % columns == 0)
            if number % columns == 0:
                axis.set_ylabel(Y_LABELS[measure])
        column[0].set_title(f"{starts[number]} start")
    if len(measures) > 1:
        panels[0, 1].set_ylim(bottom=0)
    return figure, axes


def _draw_bars(axis: Axes, group: pd.DataFrame, measure: str, style: Style) -> None:
    values = mean_over_seeds(group, measure)
    if len(values):
        axis.errorbar(values.index, values["mean"], yerr=values["std"], capsize=2.5, markersize=4, **style)


def _place_numbers(axis: Axes, values: list[float]) -> None:
    """Set ticks at the values, on an axis that has room for them."""
    positive = [value for value in values if value > 0]
    if positive and positive[-1] > 10 * positive[0]:
        if len(positive) == len(values):
            axis.set_xscale("log")
        else:
            axis.set_xscale("symlog", linthresh=positive[0])
            axis.set_xlim(-positive[0] / 4, positive[-1] * 1.5)
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.xaxis.set_minor_locator(NullLocator())
