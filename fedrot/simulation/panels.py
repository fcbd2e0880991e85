"""What the simulator's plots have in common: panels, styles of lines, the axis of rounds, and the file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .metrics import SCORES

Style = dict[str, Any]

Y_LABELS = {**SCORES, "relative_error": "relative aggregation error"}
_COLOURS = (
    *(f"C{i}" for i in range(10)),
    *("black", "darkgoldenrod", "navy", "magenta", "limegreen", "teal", "salmon"),
    *("indigo", "darkred", "darkgreen", "tan", "deepskyblue", "gold"),
)
_DASHES, _MARKERS = ("-", "--", "-.", ":"), "os^Dv<P"


def make_panels(rows: int, columns: int, height: float) -> tuple[Figure, np.ndarray]:
    """Make a figure of panels that share their x axes by column, each ``height`` inches high."""
    figure = Figure(figsize=(max(7, 5 * columns), 0.5 + height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=True, squeeze=False)


def line_styles(rows: pd.DataFrame) -> dict[str, Style]:
    """Choose a line style per method: colours, dashes and markers have periods 23, 4 and 7, so that none comes twice."""
    return {
        method: {"label": method, "color": _COLOURS[i % 23], "linestyle": _DASHES[i % 4], "marker": _MARKERS[i % 7]}
        for i, method in enumerate(dict.fromkeys(rows["method"]))
    }


def mean_over_seeds(group: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The mean and the standard deviation of a measure by x, over the rows that have it; 0 for a single seed."""
    if measure not in group:
        return pd.DataFrame(columns=["mean", "std"])
    values = group.assign(y=pd.to_numeric(group[measure])).dropna(subset=["y"])
    return values.groupby("x")["y"].agg(["mean", "std"]).fillna(0)


def draw_line(axis: Axes, group: pd.DataFrame, measure: str, style: Style) -> None:
    """Draw the mean over seeds by round, in a band of one standard deviation.

    Args:
        axis: the panel.
        group: a row per seed and round; x is the round, from 1.
        measure: the column to draw. Nothing is drawn if no row has it.
        style: the line's.
    """
    values = mean_over_seeds(group, measure)
    if len(values):
        axis.plot(values.index, values["mean"], markersize=3.5, **style)
        low, high = values["mean"] - values["std"], values["mean"] + values["std"]
        axis.fill_between(values.index, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axis.xaxis.set_major_locator(RoundLocator())


class RoundLocator(MaxNLocator):
    """Ticks at whole numbers of rounds, the first at round 1, where other locators put 0."""

    def __init__(self) -> None:
        super().__init__(integer=True)

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        """See ``matplotlib.ticker.Locator.tick_values``."""
        whole = [float(x) for x in super().tick_values(max(vmin, 1), max(vmax, 1)) if x > 1 and x == round(x)]
        return [1.0, *whole] if vmin <= 1 <= vmax else whole


def fit_magnitudes(axis: Axes) -> None:
    """Begin the y axis at 0 or, where a decade does not hold what is drawn, make it logarithmic and leave out zeros."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines] or [np.ones(1)])
    positive = drawn[drawn > 0]
    if len(positive) and positive.max() > 10 * positive.min():
        for line in axis.lines:
            y = np.asarray(line.get_ydata(), dtype=float)
            line.set_ydata(np.where(y > 0, y, np.nan))
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)


def finish_figure(figure: Figure, axes: np.ndarray, x: str, path: Path) -> Figure:
    """Add a grid, the label of the x axis below every column and one legend below the panels, and write the file."""
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
