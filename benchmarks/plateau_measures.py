"""When runs leave the plateau, and by how much methods differ: intervals over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from .plateau_runs import FinishedRun, Setting

BASELINE = "fedit"
ROUNDS = (2, 5, 10, 20, 50, 100)
FRACTIONS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)  # of the way from chance to FedIT's best
MEASURES = ("relative_error", "norm_B")

Seeds = dict[int, FinishedRun]


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its 95 % t interval, which are NaN for fewer than two values."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """Compute the mean and its 95 % interval by Student's t, which assumes that seeds scatter normally."""
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def smoothed(accuracy: pd.Series) -> pd.Series:
    """The centred median of five evaluations, of fewer at either end."""
    return accuracy.rolling(5, center=True, min_periods=1).median()


def leaving_round(accuracy: pd.Series, threshold: float) -> int | None:
    """Find the first round in which the smoothed accuracy reaches the threshold; None if it never does.

    Args:
        accuracy: by round, only rounds that were evaluated.
        threshold: the accuracy to reach.
    """
    above = smoothed(accuracy) >= threshold
    return int(accuracy.index[int(above.argmax())]) if above.any() else None


def evaluations_back(accuracy: pd.Series, threshold: float) -> int:
    """Count the evaluations below the threshold after the run has left the plateau: how often it falls back."""
    left = leaving_round(accuracy, threshold)
    return 0 if left is None else int((accuracy[accuracy.index > left] < threshold).sum())


def accuracy_by_round(run: FinishedRun) -> pd.Series:
    """The accuracy of the rounds that were evaluated."""
    return run.rows.set_index("round")["accuracy"].dropna()


def early_accuracy(runs: Sequence[FinishedRun]) -> float:
    """The median accuracy of the first three evaluations of the runs: chance, if all begin on the plateau."""
    return float(np.median(np.concatenate([accuracy_by_round(run).iloc[:3] for run in runs])))


def by_setting(runs: Sequence[FinishedRun]) -> dict[Setting, Seeds]:
    """Group runs by setting, in the order of the runs, and by seed."""
    groups: dict[Setting, Seeds] = {}
    for run in runs:
        groups.setdefault(run.setting, {})[run.config.seed] = run
    return {setting: dict(sorted(seeds.items())) for setting, seeds in groups.items()}


def baseline_of(setting: Setting, groups: Mapping[Setting, Seeds]) -> Seeds:
    """The runs of FedIT in the same place, with the same values of all varied fields that play a part in FedIT."""
    for other, seeds in groups.items():
        is_fedit = next(iter(seeds.values())).method == BASELINE
        if is_fedit and other.place == setting.place and other.own <= setting.own:
            return seeds
    return {}


def baseline_runs(runs: Sequence[FinishedRun]) -> Sequence[FinishedRun]:
    """FedIT's among the runs, or all if there are none: what thresholds rest on must not change with every run that ends."""
    return [run for run in runs if run.method == BASELINE] or runs


def summarize(runs: Sequence[FinishedRun], chance: float | None = None) -> pd.DataFrame:
    """Measure every setting.

    Args:
        runs: finished runs.
        chance: the accuracy on the plateau; if None, ``early_accuracy`` of FedIT on each task.

    Returns:
        A row per setting. "left" is the round in which the plateau is left. Its mean and interval are NaN where a seed did
        not leave it. "left_at_least" counts such a seed with its last round.
    """
    groups = by_setting(runs)
    rows = []
    for setting, seeds in groups.items():
        alike = baseline_runs([run for run in runs if run.setting.place == setting.place])
        of_task = baseline_runs([run for run in runs if run.setting.task == setting.task])
        on_plateau = early_accuracy(of_task) if chance is None else chance
        best = max(accuracy_by_round(run).max() for run in alike)
        threshold = (on_plateau + best) / 2
        total = next(iter(seeds.values())).config.rounds
        left = {seed: leaving_round(accuracy_by_round(run), threshold) for seed, run in seeds.items()}
        others = baseline_of(setting, groups) if not _is_baseline(seeds) else {}
        others_left = {seed: leaving_round(accuracy_by_round(run), threshold) for seed, run in others.items()}
        row: dict[str, Any] = {"task": setting.task, "dtype": setting.dtype, "clients": setting.clients}
        row |= {"method": setting.method, "seeds": len(seeds), "rounds": total}
        row |= {"chance": on_plateau, "best_of_fedit": best, "threshold": threshold}
        back = [evaluations_back(accuracy_by_round(run), threshold) for run in seeds.values()]
        row |= {"back_by_seed": ", ".join(map(str, back))}
        row |= _leaving(left, total) | _differences(left, others_left, total)
        row |= _over_thresholds(seeds, others, on_plateau, best) | _scores(seeds)
        for measure in MEASURES:
            row |= _by_round(measure, seeds, others, total)
        rows.append(row)
    return pd.DataFrame(rows)


def _is_baseline(seeds: Seeds) -> bool:
    return next(iter(seeds.values())).method == BASELINE


def _leaving(left: Mapping[int, int | None], total: int) -> dict[str, Any]:
    known = [x for x in left.values() if x is not None]
    never = len(left) - len(known)
    row = _columns("left", t_interval([] if never else known))
    row |= {"never": never, "left_at_least": float(np.mean([*known, *[total] * never]))}
    return row | {"left_by_seed": ", ".join(f"> {total}" if x is None else str(x) for x in left.values())}


def _differences(left: Mapping[int, int | None], others: Mapping[int, int | None], total: int) -> dict[str, Any]:
    """Subtract FedIT's round from the setting's by seed. If one of the two did not leave, the difference has a bound."""
    shown, exact = [], []
    for seed, own in left.items():
        other = others.get(seed)
        if seed not in others:
            shown.append("–")
        elif own is not None and other is not None:
            exact.append(own - other)
            shown.append(f"{own - other:+d}")
        elif other is not None:
            shown.append(f"> {total - other:+d}")
        else:
            shown.append("?" if own is None else f"< {own - total:+d}")
    pairs = len(left.keys() & others.keys())
    row = _columns("minus_fedit", t_interval(exact if len(exact) == pairs else []))
    return row | {"minus_fedit_by_seed": ", ".join(shown) if pairs else ""}


def _over_thresholds(seeds: Seeds, others: Seeds, on_plateau: float, best: float) -> dict[str, Any]:
    """Subtract FedIT's round from the setting's by seed, as a mean over thresholds.

    Where accuracy climbs slowly, a little more or less of a threshold is many rounds. There is no interval if a run does not
    reach one of the thresholds.
    """
    means = []
    for seed in seeds.keys() & others.keys():
        own, other = (accuracy_by_round(some[seed]) for some in (seeds, others))
        rounds = [
            [leaving_round(x, on_plateau + f * (best - on_plateau)) or math.nan for x in (own, other)] for f in FRACTIONS
        ]
        means.append(float(np.mean([a - b for a, b in rounds])))
    return _columns("minus_fedit_over", t_interval([] if any(map(math.isnan, means)) else means))


def _scores(seeds: Seeds) -> dict[str, float]:
    by_round = [accuracy_by_round(run) for run in seeds.values()]
    return _spread("last", [x.iloc[-1] for x in by_round]) | _spread("best", [x.max() for x in by_round])


def _by_round(measure: str, seeds: Seeds, others: Seeds, total: int) -> dict[str, float]:
    """The measure and its ratio to FedIT's of the same seed, in some rounds."""
    row: dict[str, float] = {}
    values = {seed: _values(run, measure) for seed, run in seeds.items()}
    baseline = {seed: _values(run, measure) for seed, run in others.items()}
    for number in (number for number in ROUNDS if number <= total):
        row |= _spread(f"{measure}_{number}", [x[number] for x in values.values()])
        pairs = [(values[seed][number], baseline[seed][number]) for seed in values if seed in baseline]
        row |= _spread(f"{measure}_{number}_ratio", [own / other for own, other in pairs if other > 0])
    return row


def _values(run: FinishedRun, measure: str) -> pd.Series:
    """The measure by round, NaN where it was not measured or a method has none."""
    rows = run.rows.set_index("round").reindex(columns=[measure])
    return pd.to_numeric(rows[measure])


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {f"{name}_mean": interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    known = pd.Series(values, dtype=float).dropna()
    return {f"{name}_mean": known.mean(), f"{name}_std": known.std()}
