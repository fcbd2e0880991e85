"""Runs methods side by side, over seeds and whatever else varies, and leaves their tables and plots."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ...adapters.files import check_new
from ...options import OPTION_NAMES
from ..config import SimulationConfig
from ..plots import plot_geometry
from ..run import BASE_MODEL, CONFIG, CURVES, simulate
from ..tasks import Task, load_task
from .comparison import Comparison, Run
from .plots import plot_comparison, plot_sweep
from .tables import as_markdown, as_text, comparison_tables, repeat_unvaried, rounds_tables, with_labels

RESULTS, TABLE, MARKDOWN, ROUNDS = "results.csv", "table.txt", "table.md", "rounds.md"
SWEEP, GEOMETRY = "sweep.png", "geometry.png"

# Runs that differ in these alone share the data and the base model.
_NOT_OF_THE_TASK = {
    *("lora", "lora_scaling", "partition", "dirichlet_alpha", "clients", "clients_per_round", "clients_per_pass"),
    *("rounds", "local_steps", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "max_grad_norm"),
    *(*OPTION_NAMES, "client_weights", "server_optimizer", "server_lr", "start", "seed", "device"),
    *("eval_every", "eval_batch_size"),
}


def compare(comparison: Comparison, folder: Path, *, resume: bool = False, progress: bool = True) -> str:
    """Run everything that is compared, and write tables, plots and all rows as CSV.

    Args:
        comparison: the runs.
        folder: for all files, a folder per run below it; must not exist, unless resuming.
        resume: finish the runs that are not finished.
        progress: show a progress bar per run.

    Returns:
        The tables, and a line for each method or variant that was not run from every start.

    Raises:
        FileExistsError: the folder exists.
        ValueError: see ``Comparison.runs``, before anything is run, and ``simulate``.
    """
    runs, notes = comparison.runs()
    if not resume:
        check_new(folder)
    runs = _by_task(runs)
    task = _load_task(runs[0], runs, folder)
    if not resume:
        folder.mkdir(parents=True)
        save_comparison(comparison, folder / CONFIG)
    tables = []
    for number, run in enumerate(runs):
        if number and _task_fields(run.config) != _task_fields(runs[number - 1].config):
            task = _load_task(run, runs, folder)
        path, title = folder / run.name, f"{number + 1}/{len(runs)} {run.name}"
        result = simulate(run.config, path, task=task, resume=path.exists(), progress=progress, title=title)
        metrics = pd.DataFrame(result.metrics).drop(columns=["clients", "dropped"])  # that took part
        tables.append(metrics.assign(**run.columns))
    rows = pd.concat(tables, ignore_index=True)
    first = [*runs[0].columns, *comparison.vary]
    rows = rows[[*dict.fromkeys(first), *(name for name in rows if name not in first)]]
    rows.to_csv(folder / RESULTS, index=False)
    _plot(rows, comparison, folder)
    found = comparison_tables(rows, list(comparison.vary))
    (folder / TABLE).write_text((text := as_text(found, notes)) + "\n", "utf-8")
    (folder / MARKDOWN).write_text(as_markdown(found, notes) + "\n", "utf-8")
    (folder / ROUNDS).write_text(as_markdown(rounds_tables(rows, list(comparison.vary)), notes) + "\n", "utf-8")
    return text


def save_comparison(comparison: Comparison, path: Path) -> None:
    """Write a comparison as YAML, the options of ``fedrot compare``."""
    options = asdict(comparison)
    options |= options.pop("fields")
    path.write_text(yaml.safe_dump(_plain(options), sort_keys=False, allow_unicode=True), "utf-8")


def _plain(value: Any) -> Any:
    """Replace tuples, which YAML does not have, by lists."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


def _task_fields(config: SimulationConfig) -> str:
    """A key that configurations have in common whose runs share data and base model."""
    return repr({name: value for name, value in vars(config).items() if name not in _NOT_OF_THE_TASK})


def _by_task(runs: list[Run]) -> list[Run]:
    """Order the runs so that every task is loaded once."""
    order = {fields: number for number, fields in reversed(list(enumerate(_task_fields(run.config) for run in runs)))}
    return sorted(runs, key=lambda run: order[_task_fields(run.config)])


def _load_task(run: Run, runs: list[Run], folder: Path) -> Task:
    """Load the run's task, with the weights of an embedded model if an earlier run of the task saved them."""
    same = [other.name for other in runs if _task_fields(other.config) == _task_fields(run.config)]
    return load_task(run.config, next((path for name in same if (path := folder / name / BASE_MODEL).exists()), None))


def _plot(rows: pd.DataFrame, comparison: Comparison, folder: Path) -> None:
    fields = list(comparison.vary)
    panels = with_labels(rows, ["strength"])
    for field in reversed(fields):
        panels = repeat_unvaried(panels, field)
        panels["start"] = field + " " + panels[field].map(str) + ", " + panels["start"]
    plot_comparison(panels, folder / CURVES)
    if "error_bound" in rows:
        plot_geometry(with_labels(rows, ["strength", *fields]), folder / GEOMETRY)
    swept = [*fields, "strength"] if rows["strength"].nunique() > 1 else fields
    for field in swept:
        others = [other for other in ("strength", *fields) if other != field]
        name = SWEEP if len(swept) == 1 else f"sweep-{field}.png"
        plot_sweep(repeat_unvaried(with_labels(rows, others), field), field, folder / name)
