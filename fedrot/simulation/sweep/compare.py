"""Runs methods side by side, over seeds and whatever else varies, and leaves their tables and plots."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ...adapters.files import check_new
from ..metrics import read_metrics
from ..plots import plot_geometry
from ..run import CONFIG, CURVES, METRICS, simulate
from ..tasks import Task
from .comparison import Comparison, Run
from .plots import plot_comparison, plot_sweep
from .shared_tasks import by_task, cache_models, load_run_task, saved_models, task_fields
from .tables import as_markdown, as_text, comparison_tables, repeat_unvaried, rounds_tables, with_labels
from .workers import run_in_processes

RESULTS, TABLE, MARKDOWN, ROUNDS = "results.csv", "table.txt", "table.md", "rounds.md"
SWEEP, GEOMETRY = "sweep.png", "geometry.png"


def compare(comparison: Comparison, folder: Path, *, resume: bool = False, progress: bool = True, workers: int = 1) -> str:
    """Run everything that is compared, and write tables, plots and all rows as CSV.

    Args:
        comparison: the runs.
        folder: for all files, a folder per run below it; must not exist, unless resuming.
        resume: finish the runs that are not finished.
        progress: show a progress bar per run, or one for all runs with several workers.
        workers: the number of processes, each of which has its share of PyTorch's threads and takes one run at a time. A run
            does not depend on the others. Its bits are those of a single process that has as many threads. A script that
            calls this with several workers needs ``if __name__ == "__main__":``, as these processes import it.

    Returns:
        The tables, and a line for each method or variant that was not run from every start.

    Raises:
        FileExistsError: the folder exists.
        ValueError: see ``Comparison.runs``, before anything is run, and ``simulate``; or no worker.
        OSError, RuntimeError: with several workers, see ``run_in_processes``.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    runs, notes = comparison.runs()
    if not resume:
        check_new(folder)
    runs = by_task(runs)
    saved = saved_models(runs, folder)
    task = load_run_task(runs[0], saved)
    if not resume:
        folder.mkdir(parents=True)
        save_comparison(comparison, folder / CONFIG)
    if (workers := min(workers, len(runs))) == 1:
        _run_in_turn(runs, folder, task, saved, progress)
    else:
        del task  # every process loads its own
        cache_models(runs, saved)
        run_in_processes(runs, folder, saved, workers=workers, progress=progress)
    rows = _read_rows(runs, folder)
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


def _run_in_turn(runs: list[Run], folder: Path, task: Task, saved: Mapping[str, Path], progress: bool) -> None:
    """Run everything in this process, the first run with the task that is loaded."""
    for number, run in enumerate(runs):
        if number and task_fields(run.config) != task_fields(runs[number - 1].config):
            task = load_run_task(run, saved)
        path, title = folder / run.name, f"{number + 1}/{len(runs)} {run.name}"
        simulate(run.config, path, task=task, resume=path.exists(), progress=progress, title=title)


def _read_rows(runs: list[Run], folder: Path) -> pd.DataFrame:
    """Read a row per run and round, the columns that tell the runs apart beside the metrics."""
    tables = []
    for run in runs:
        metrics = pd.DataFrame(read_metrics(folder / run.name / METRICS, run.config.rounds))
        tables.append(metrics.drop(columns=["clients", "dropped"]).assign(**run.columns))  # clients that took part
    return pd.concat(tables, ignore_index=True)


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
