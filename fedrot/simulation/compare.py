"""Methods side by side, over seeds: the runs, one table and one plot."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pandas as pd
import yaml

from ..folders import check_new
from ..methods import METHODS
from .config import SimulationConfig, Start
from .plots import plot_comparison
from .run import BASE_MODEL, CONFIG, CURVES, simulate
from .task import load_task

VARIED = ("method", "strength", "start", "seed")
RESULTS, TABLE = "results.csv", "table.txt"


def compare(
    config: SimulationConfig,
    folder: Path,
    *,
    methods: Sequence[str],
    strengths: Sequence[float],
    starts: Sequence[Start],
    seeds: Sequence[int],
    resume: bool = False,
    progress: bool = True,
) -> str:
    """Run every method from every start with every seed, and leave a table, the curves and all rows as CSV.

    Args:
        config: what the runs have in common; its method, strength, start and seed are replaced.
        folder: for all files, a folder per run below it; must not exist, unless resuming.
        methods, starts, seeds: what to vary.
        strengths: the λ to run methods with that rotate.
        resume: finish the runs that are not finished.
        progress: show a progress bar per run.

    Returns:
        The table.
    """
    runs: dict[str, tuple[str, SimulationConfig]] = {}
    for start, method, seed in product(starts, methods, seeds):
        for label, name, strength in _variants(method, strengths):
            run = replace(config, method=method, strength=strength, start=start, seed=seed)
            runs[f"{start}-{name}-seed{seed}"] = label, run
    if not resume:
        check_new(folder)
    task = load_task(config, next((path for name in runs if (path := folder / name / BASE_MODEL).exists()), None))
    if not resume:
        folder.mkdir(parents=True)
        varied = {"methods": [*methods], "strengths": [*strengths], "starts": [*starts], "seeds": [*seeds]}
        common = {name: value for name, value in asdict(config).items() if name not in VARIED}
        (folder / CONFIG).write_text(yaml.safe_dump({**varied, **common}, sort_keys=False, allow_unicode=True), "utf-8")
    tables = []
    for number, (name, (label, run)) in enumerate(runs.items(), start=1):
        path, title = folder / name, f"{number}/{len(runs)} {label}, {run.start} start, seed {run.seed}"
        result = simulate(run, path, task=task, resume=path.exists(), progress=progress, title=title)
        tables.append(pd.DataFrame(result.metrics).assign(method=label, start=run.start, seed=run.seed))
    rows = pd.concat(tables, ignore_index=True)
    rows.drop(columns=["clients", "dropped"]).to_csv(folder / RESULTS, index=False)
    plot_comparison(rows, folder / CURVES)
    table = comparison_table(rows)
    (folder / TABLE).write_text(table + "\n", "utf-8")
    return table


def _variants(method: str, strengths: Sequence[float]) -> list[tuple[str, str, float]]:
    """The labels, folder names and strengths to run a method with: one if it does not rotate."""
    if method in METHODS and not METHODS[method].rotates:
        return [(method, method, strengths[0])]
    return [(f"{method} λ={strength:g}", f"{method}-{strength:g}", strength) for strength in strengths]


def comparison_table(rows: pd.DataFrame) -> str:
    """Accuracy and relative aggregation error after the first and the last evaluated round, mean ± deviation over seeds.

    Args:
        rows: a row per run and round, as ``plot_comparison`` takes them.
    """
    evaluated = rows.dropna(subset=["accuracy"])
    first, last = evaluated["round"].min(), evaluated["round"].max()
    cells = {}
    for (start, method), group in evaluated.groupby(["start", "method"], sort=False):
        cells[start, method] = {
            f"{label}, round {round + 1}": _mean_deviation(group.loc[group["round"] == round, measure])
            for measure, label in (("accuracy", "accuracy"), ("relative_error", "relative error"))
            for round in dict.fromkeys((first, last))
        }
    return pd.DataFrame.from_dict(cells, orient="index").rename_axis(["start", "method"]).to_string()


def _mean_deviation(values: pd.Series) -> str:
    return f"{values.mean():.3f}" if len(values) < 2 else f"{values.mean():.3f} ± {values.std():.3f}"
