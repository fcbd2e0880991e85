"""Accuracy, ‖B̄‖ and relative error by round, a column of panels for each task, dtype and number of clients."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedrot.simulation.panels import (
    Y_LABELS,
    RoundLocator,
    Style,
    finish_figure,
    fit_magnitudes,
    line_styles,
    make_panels,
    mean_over_seeds,
)

from .plateau_runs import FinishedRun

LABELS = {"accuracy": Y_LABELS["accuracy"], "norm_B": "‖B̄‖", "relative_error": Y_LABELS["relative_error"]}
_ROUNDING = 1e-6


def plot_plateau(runs: Sequence[FinishedRun], summary: pd.DataFrame, path: Path) -> Figure:
    """Plot every method's mean over seeds, each seed as a thin line, and where methods leave the plateau.

    A mark on the dotted threshold is the mean round in which a method leaves. A method of which a seed never leaves has no
    mark. Methods whose relative error is rounding have no line there.

    Args:
        runs: finished runs.
        summary: what ``summarize`` found in them.
        path: the PNG to write.

    Returns:
        The figure.
    """
    rows = pd.concat([run.rows.assign(place=[run.setting.place] * len(run.rows), **_names(run)) for run in runs])
    error = pd.to_numeric(rows["relative_error"])
    rows = rows.assign(x=rows["round"], relative_error=error.where(error > _ROUNDING))
    styles, places = line_styles(rows), list(dict.fromkeys(rows["place"]))
    figure, axes = make_panels(len(LABELS), len(places), height=2.8)
    for place, column in zip(places, axes.T, strict=True):
        some = rows[rows["place"] == place]
        for axis, measure in zip(column, LABELS, strict=True):
            for method, group in some.groupby("method", sort=False):
                _draw(axis, group, measure, styles[method])
        _mark(column[0], _at(summary, place), styles)
        task, dtype, clients = place
        several = summary["task"].nunique() > 1
        column[0].set_title((f"{task}: " if several else "") + f"{clients} clients, {dtype}")
        for axis in column[1:]:
            fit_magnitudes(axis)
    for axis, label in zip(axes[:, 0], LABELS.values(), strict=True):
        axis.set_ylabel(label)
    return finish_figure(figure, axes, "round", path)


def _names(run: FinishedRun) -> dict[str, object]:
    return {"method": run.setting.method, "seed": run.config.seed}


def _at(summary: pd.DataFrame, place: tuple[str, str, int]) -> pd.DataFrame:
    task, dtype, clients = place
    return summary[(summary["task"] == task) & (summary["dtype"] == dtype) & (summary["clients"] == clients)]


def _draw(axis: Axes, group: pd.DataFrame, measure: str, style: Style) -> None:
    """Draw the mean over seeds with some markers, and a thin line per seed."""
    means = mean_over_seeds(group, measure)["mean"]
    if len(means):
        axis.plot(means.index, means, markersize=3.5, markevery=max(1, len(means) // 8), **style)
    thin = style | {"label": "_", "marker": "", "linewidth": 0.5, "alpha": 0.5}
    for _, seed in group.groupby("seed") if measure in group else ():
        known = seed.dropna(subset=[measure])
        axis.plot(known["x"], pd.to_numeric(known[measure]), **thin)
    axis.xaxis.set_major_locator(RoundLocator())


def _mark(axis: Axes, settings: pd.DataFrame, styles: dict[str, Style]) -> None:
    """Mark where methods leave the plateau, on a dotted line at the threshold."""
    axis.axhline(settings["threshold"].iloc[0], color="grey", linestyle=":", linewidth=1)
    records = settings.dropna(subset=["left_mean"]).to_dict("records")
    for size, row in zip(np.linspace(13, 6, len(records)), records, strict=True):  # so that none hides another
        style = {name: styles[row["method"]][name] for name in ("color", "marker")}
        axis.plot(row["left_mean"], row["threshold"], markersize=size, markeredgecolor="black", label="_", zorder=5, **style)
