"""Curves of accuracy and aggregation error by round."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from .config import SimulationConfig

_MEASURES = {"accuracy": "accuracy", "relative_error": "relative aggregation error"}


def plot_run(metrics: list[dict[str, Any]], config: SimulationConfig, path: Path) -> None:
    """One run's curves."""
    rows = pd.DataFrame(metrics).assign(start=config.start, seed=config.seed)
    plot_comparison(rows, path)


def plot_comparison(rows: pd.DataFrame, path: Path) -> None:
    """Curves by method (colours) and start (columns): the mean over seeds, and a band of one standard deviation.

    Args:
        rows: a row per run and round, with start, method, seed, round, accuracy and relative_error.
        path: the PNG to write.
    """
    starts = list(dict.fromkeys(rows["start"]))
    figure, axes = plt.subplots(
        len(_MEASURES), len(starts), figsize=(5 * len(starts), 6), sharex=True, sharey="row", squeeze=False
    )
    for column, start in enumerate(starts):
        for axis, (measure, label) in zip(axes[:, column], _MEASURES.items(), strict=True):
            for method, group in rows[rows["start"] == start].groupby("method", sort=False):
                values = group.dropna(subset=[measure]).groupby("round")[measure].agg(["mean", "std"]).fillna(0)
                x = values.index + 1
                (line,) = axis.plot(x, values["mean"], marker="o", markersize=3, label=method)
                axis.fill_between(
                    x, values["mean"] - values["std"], values["mean"] + values["std"], color=line.get_color(), alpha=0.2
                )
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        axes[0, column].set_title(f"{start} start")
        axes[0, column].legend()
        axes[-1, column].set_xlabel("round")
    axes[0, 0].set_ylim(0, 1)
    axes[1, 0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
