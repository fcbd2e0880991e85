"""Scores, errors and the geometry of alignment by round, and against a configuration field that was varied."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from .config import SimulationConfig

SCORES = {"accuracy": "accuracy", "exact_match": "exact match", "pass_at_1": "pass@1", "loss": "loss"}
_FIELDS = {
    "strength": "strength λ",
    "dirichlet_alpha": "Dirichlet α",
    "lora.r": "rank r",
    "clients": "clients N",
    "lr": "learning rate",
}
_COLOURS = (*(f"C{i}" for i in range(10)), "black", "darkgoldenrod", "navy")
_DASHES, _MARKERS = ("-", "--", "-.", ":"), "os^Dv<P"
_GEOMETRY = {  # a row of panels each, for A and for B
    "removed": "part of squared distance\nthat rotation removes",
    "turn_per_distance": "‖Rᵢ − I‖ / ‖Fᵢ − F_ref‖\nmean; largest (thin)",
    "smallest_relative_distance": "smallest\n‖Fᵢ − F_ref‖ / ‖F_ref‖",
}


def shown_score(rows: pd.DataFrame) -> str:
    """The column to show: the first of accuracy, exact_match, pass_at_1 and loss that has values.

    Raises:
        ValueError: none has.
    """
    for name in SCORES:
        if name in rows and rows[name].notna().any():
            return name
    raise ValueError(f"no round was evaluated: the rows have none of {', '.join(SCORES)}")


def plot_run(metrics: list[dict[str, Any]], config: SimulationConfig, path: Path) -> Figure:
    """One run's curves."""
    return plot_comparison(pd.DataFrame(metrics).assign(start=config.start, seed=config.seed), path)


def plot_comparison(rows: pd.DataFrame, path: Path) -> Figure:
    """The score and the relative error by round: a line per method, panels per start.

    Lines are means over seeds, in a band of one standard deviation.

    Args:
        rows: a row per run and round, with start, method, seed, round, a score and relative_error.
        path: the PNG to write.

    Returns:
        The figure.
    """
    score = shown_score(rows)
    figure, axes = _by_start(rows, score, _line)
    if score != "loss":
        axes[0, 0].set_ylim(0, 1)
    return _finish(figure, axes, "round", path)


def plot_sweep(rows: pd.DataFrame, field: str, path: Path) -> Figure:
    """The score and the relative error at the end of every run against a field of the configuration that was varied.

    Points are means over seeds, bars one standard deviation. Numbers over more than one decade lie on a logarithmic axis,
    on which 0 has its place.

    Args:
        rows: as for ``plot_comparison``, with a column of the field's name; each run's last round counts.
        field: its values are numbers, or else are taken as names.
        path: the PNG to write.

    Returns:
        The figure.
    """
    score = shown_score(rows)
    runs = rows.groupby(["start", "method", field, "seed"], sort=False, dropna=False)
    last = rows[rows["round"] == runs["round"].transform("max")]
    numeric = pd.api.types.is_numeric_dtype(rows[field]) and not pd.api.types.is_bool_dtype(rows[field])
    values = sorted(rows[field].dropna().unique()) if numeric else list(dict.fromkeys(rows[field].map(str)))
    last = last.assign(x=last[field] if numeric else last[field].map(str).map(values.index))
    figure, axes = _by_start(last, score, _bars)
    for axis in axes.flat:
        if numeric:
            _numbers(axis, values)
        else:
            axis.set_xticks(range(len(values)), values)
    return _finish(figure, axes, _FIELDS.get(field, field), path)


def plot_geometry(rows: pd.DataFrame, path: Path) -> Figure:
    """What the paper's analysis rests on, by round, for A and for B; and the aggregation error beside its bound.

    Args:
        rows: a row per run and round, with method, round, aggregation_error and what ``alignment_geometry`` returns.
            Several seeds are averaged; of several starts each has its lines.
        path: the PNG to write.

    Returns:
        The figure.
    """
    if "start" in rows and rows["start"].nunique() > 1:
        rows = rows.assign(method=rows["method"] + ", " + rows["start"] + " start")
    error = pd.to_numeric(rows["aggregation_error"]).where(rows["error_bound"] > 0)  # the others' is rounding
    rows = rows.assign(x=rows["round"] + 1, aggregation_error=error, ratio=error / rows["error_bound"])
    figure, axes = _panels(len(_GEOMETRY) + 1, 2, height=2.2)
    for method, style in _styles(rows).items():
        group, thin = rows[rows["method"] == method], _thin(style)
        for column, factor in enumerate("AB"):
            for axis, name in zip(axes[:-1, column], _GEOMETRY, strict=True):
                _line(axis, group, f"{name}_{factor}", style)
                _line(axis, group, f"{name}_{factor}_max", thin)
        _line(axes[-1, 0], group, "aggregation_error", style)
        _line(axes[-1, 0], group, "error_bound", thin)
        _line(axes[-1, 1], group, "ratio", style)
    for axis in axes.flat:
        _magnitudes(axis)
    for axis, label in zip(axes[:, 0], [*_GEOMETRY.values(), "aggregation error;\nits bound (thin)"], strict=True):
        axis.set_ylabel(label)
    axes[-1, 1].set(ylabel="error / bound", yscale="linear", ylim=(0, 1))
    axes[0, 0].set_title("F = A")
    axes[0, 1].set_title("F = Bᵀ")
    return _finish(figure, axes, "round", path)


Style = dict[str, Any]
Draw = Callable[[Axes, pd.DataFrame, str, Style], None]


def _by_start(rows: pd.DataFrame, score: str, draw: Draw) -> tuple[Figure, np.ndarray]:
    """The score above the relative error, a column per start, drawn against column x, or the round.

    More than three starts go below each other, so that a page's width shows them.
    """
    starts, styles = list(dict.fromkeys(rows["start"])), _styles(rows)
    bands = -(-len(starts) // 3)
    columns = -(-len(starts) // bands)
    figure, axes = _panels(2 * bands, columns, height=2.6)
    if "x" not in rows:
        rows = rows.assign(x=rows["round"] + 1)
    for number, (above, below) in enumerate(axes.reshape(bands, 2, columns).swapaxes(1, 2).reshape(-1, 2)):
        if number >= len(starts):
            above.set_visible(False)
            below.set_visible(False)
            continue
        if number:
            above.sharey(axes[0, 0])
            below.sharey(axes[1, 0])
        for axis, measure in ((above, score), (below, "relative_error")):
            for method, group in rows[rows["start"] == starts[number]].groupby("method", sort=False):
                draw(axis, group, measure, styles[method])
            axis.tick_params(labelleft=number % columns == 0)
        above.set_title(f"{starts[number]} start")
        if number % columns == 0:
            above.set_ylabel(SCORES[score])
            below.set_ylabel("relative aggregation error")
    axes[1, 0].set_ylim(bottom=0)
    return figure, axes


def _panels(rows: int, columns: int, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(7, 5 * columns), 0.5 + height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=True, squeeze=False)


def _styles(rows: pd.DataFrame) -> dict[str, Style]:
    """A line style per method: colours, dashes and markers have periods 13, 4 and 7, so that none comes twice."""
    return {
        method: {"label": method, "color": _COLOURS[i % 13], "linestyle": _DASHES[i % 4], "marker": _MARKERS[i % 7]}
        for i, method in enumerate(dict.fromkeys(rows["method"]))
    }


def _thin(style: Style) -> Style:
    return style | {"label": "_", "marker": "", "linewidth": 0.8}


def _over_seeds(group: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Mean and standard deviation (0 of one seed) of the rows that have the measure, by x."""
    if measure not in group:
        return pd.DataFrame(columns=["mean", "std"])
    values = group.assign(y=pd.to_numeric(group[measure])).dropna(subset=["y"])
    return values.groupby("x")["y"].agg(["mean", "std"]).fillna(0)


def _line(axis: Axes, group: pd.DataFrame, measure: str, style: Style) -> None:
    values = _over_seeds(group, measure)
    if len(values):
        axis.plot(values.index, values["mean"], markersize=3.5, **style)
        low, high = values["mean"] - values["std"], values["mean"] + values["std"]
        axis.fill_between(values.index, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _bars(axis: Axes, group: pd.DataFrame, measure: str, style: Style) -> None:
    values = _over_seeds(group, measure)
    if len(values):
        axis.errorbar(values.index, values["mean"], yerr=values["std"], capsize=2.5, markersize=4, **style)


def _magnitudes(axis: Axes) -> None:
    """From 0, or logarithmic, without the zeros, where a decade does not hold what is drawn."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines] or [np.ones(1)])
    positive = drawn[drawn > 0]
    if len(positive) and positive.max() > 10 * positive.min():
        for line in axis.lines:
            y = np.asarray(line.get_ydata(), dtype=float)
            line.set_ydata(np.where(y > 0, y, np.nan))
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)


def _numbers(axis: Axes, values: list[float]) -> None:
    """Ticks at the values, on an axis that has room for them."""
    positive = [value for value in values if value > 0]
    if positive and positive[-1] > 10 * positive[0]:
        if len(positive) == len(values):
            axis.set_xscale("log")
        else:
            axis.set_xscale("symlog", linthresh=positive[0])
            axis.set_xlim(-positive[0] / 4, positive[-1] * 1.5)
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.xaxis.set_minor_locator(NullLocator())


def _finish(figure: Figure, axes: np.ndarray, x: str, path: Path) -> Figure:
    """Grid, one legend below the panels, and the file."""
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for column in axes.T:
        lowest = [axis for axis in column if axis.get_visible()][-1]
        lowest.set_xlabel(x)
        lowest.tick_params(labelbottom=True)
    shown = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    widest = max(map(len, shown), default=0)
    columns = max(1, min(len(shown), int(figure.get_figwidth() / (0.7 + 0.075 * widest))))
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(shown) // columns))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=columns, frameon=False, handlelength=3)
    figure.savefig(path, dpi=120)
    return figure
