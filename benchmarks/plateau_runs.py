"""The finished runs of comparisons, whether or not the comparisons are finished."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fedrot.simulation.config import SimulationConfig
from fedrot.simulation.metrics import read_metrics
from fedrot.simulation.run import CONFIG, METRICS
from fedrot.simulation.sweep.compare import RESULTS
from fedrot.simulation.sweep.comparison import Comparison, Run
from fedrot.simulation.sweep.shared_tasks import task_fields


@dataclass(frozen=True)
class Setting:
    """What runs have in common that differ by their seed.

    Attributes:
        task: the name of the first folder with runs of this task.
        dtype, clients: as configured.
        method: the name of the method or the variant, with λ and other varied values.
        own: the start and the varied fields beside dtype and clients, with their values.
    """

    task: str
    dtype: str
    clients: int
    method: str
    own: frozenset[tuple[str, Any]]

    @property
    def place(self) -> tuple[str, str, int]:
        """What is the same for all methods that are compared."""
        return self.task, self.dtype, self.clients


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its setting, the method (or variant) alone, its configuration, and a row of metrics per round."""

    setting: Setting
    method: str
    config: SimulationConfig
    rows: pd.DataFrame


def read_runs(folders: Sequence[Path]) -> tuple[list[FinishedRun], dict[Path, tuple[int, int]]]:
    """Read the finished runs of comparisons.

    Metrics are those in the runs' folders. Runs that have none there take them from results.csv.

    Args:
        folders: the comparisons.

    Returns:
        The runs; and for every folder, how many runs are finished and how many the comparison has.

    Raises:
        ValueError: two runs of one setting and seed, or runs of one setting that differ in more than their seed.
    """
    found: dict[tuple[Setting, int], tuple[FinishedRun, Path]] = {}
    counts: dict[Path, tuple[int, int]] = {}
    titles: dict[str, str] = {}
    for folder in folders:
        comparison = Comparison.of(yaml.safe_load((folder / CONFIG).read_text("utf-8")))
        runs, _ = comparison.runs()
        results = _read_results(folder, runs)
        finished = [(run, rows) for run in runs if (rows := _read_rows(folder, run, results)) is not None]
        counts[folder] = len(finished), len(runs)
        for run, rows in finished:
            task = task_fields(replace(run.config, dtype="float32"))
            title = folder.name if folder.name not in titles.values() else str(folder)
            new = FinishedRun(_setting(run, titles.setdefault(task, title)), run.columns["method"], run.config, rows)
            for (setting, seed), (other, where) in found.items():
                if setting == new.setting:
                    _check_alike(new, folder, other, where, same_seed=seed == run.config.seed)
            found[new.setting, run.config.seed] = new, folder
    return [run for run, _ in found.values()], counts


def _setting(run: Run, task: str) -> Setting:
    own = {
        name: value for name, value in run.columns.items() if name not in ("method", "seed", "strength", "dtype", "clients")
    }
    strength = run.columns["strength"]
    label = run.columns["method"] + ("" if math.isnan(strength) else f" λ={strength:g}")
    label += "".join(f", {name} {value}" for name, value in own.items() if name != "start")
    label += "" if own["start"] == "shared" else f", {own['start']} start"
    return Setting(task, run.config.dtype, run.config.clients, label, frozenset(own.items()))


def _check_alike(new: FinishedRun, folder: Path, other: FinishedRun, where: Path, *, same_seed: bool) -> None:
    method = new.setting.method
    if same_seed:
        raise ValueError(f"{folder} and {where} both have {method} with seed {new.config.seed}; name one of them")
    fields, others = asdict(new.config), asdict(other.config)
    if unlike := [name for name in fields if name != "seed" and fields[name] != others[name]]:
        raise ValueError(f"{folder} and {where} run {method} with another {', '.join(unlike)}: report them apart")


def _read_rows(folder: Path, run: Run, results: Mapping[frozenset[Any], pd.DataFrame]) -> pd.DataFrame | None:
    """Read a run's rows; None if it is not finished."""
    rows = pd.DataFrame(read_metrics(folder / run.name / METRICS, run.config.rounds))
    if rows.empty:
        rows = results.get(_key(run.columns.items()), rows)
    return rows if len(rows) == run.config.rounds else None


def _read_results(folder: Path, runs: Sequence[Run]) -> dict[frozenset[Any], pd.DataFrame]:
    """Read the rows of results.csv by run, if there is one."""
    if not (folder / RESULTS).exists():
        return {}
    table = pd.read_csv(folder / RESULTS, keep_default_na=False, na_values=[""])
    names = [name for name in table if any(name in run.columns for run in runs)]
    keys = [_key(row.items()) for row in table[names].to_dict("records")]
    return dict(iter(table.groupby(pd.Series(keys, dtype=object), sort=False)))


def _key(columns: Iterable[tuple[str, Any]]) -> frozenset[tuple[str, Any]]:
    """The columns that tell runs apart, without those that a run does not have."""
    return frozenset((name, _plain(value)) for name, value in columns if not pd.isna(value))


def _plain(value: Any) -> Any:
    """A number as it is, anything else as text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
