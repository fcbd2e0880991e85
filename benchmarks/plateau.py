"""When methods leave the plateau near chance, from comparisons that may still be under way.

fedrot compare --preset plateau-sst2 --model DIR --dataset train.tsv --test-dataset dev.tsv --output runs/plateau-sst2
python -m benchmarks.plateau runs/plateau-sst2 --output runs/plateau

Writes plateau.md, plateau.csv (a row per setting) and plateau.png. Only finished runs count.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedrot.simulation.sweep.tables import as_markdown

from .plateau_measures import MEASURES, ROUNDS, summarize
from .plateau_plot import plot_plateau
from .plateau_runs import read_runs

PLACE = ["task", "dtype", "clients", "method"]
TITLES = {"relative_error": "Relative aggregation error", "norm_B": "‖B̄‖ of the global adapter"}
EXPLANATION = """\
A run leaves the plateau in the first round in which its smoothed accuracy reaches the threshold. Smoothed is the centred
median of five evaluations (of fewer at either end). The threshold lies halfway between chance and the best accuracy that any
run of FedIT with the same task, dtype and clients reaches in any round. Chance is {chance}.
"Back below" counts the evaluations under the threshold after that, by seed.

Brackets are 95 % t intervals over seeds. The difference to FedIT pairs runs of the same seed: below 0 the method leaves
earlier. "Over thresholds" is the mean of that difference over nine thresholds, 30 to 70 % of the way. A seed that does not
leave counts as its last round in a mean that is marked by >, and then there is no interval.
Scores are mean ± standard deviation over seeds, best is each run's best round on the test data. Factors (×) are means of the
ratio to FedIT's run of the same seed."""


def report(folders: Sequence[Path], output: Path, chance: float | None = None) -> None:
    """Write the tables and the plot of comparisons.

    Args:
        folders: the comparisons.
        output: the folder to write to; files of an earlier report are replaced.
        chance: see ``summarize``.

    Raises:
        ValueError: no finished run, and see ``read_runs``.
    """
    runs, counts = read_runs(folders)
    lines = [f"{folder}: {done} of {number} runs are finished" for folder, (done, number) in counts.items()]
    print("\n".join(lines))
    if not runs:
        raise ValueError("no run is finished")
    summary = summarize(runs, chance)
    most = summary.groupby(PLACE[:-1])["seeds"].transform("max")
    lines += [
        f"{', '.join(str(row[x]) for x in PLACE)}: {row['seeds']} of {row['most']} seeds, left out below"
        for row in summary.assign(most=most)[summary["seeds"] < most].to_dict("records")
    ]
    summary = summary[summary["seeds"] == most]
    whole = {tuple(row) for row in summary[PLACE].itertuples(index=False)}
    runs = [run for run in runs if (*run.setting.place, run.setting.method) in whole]
    output.mkdir(parents=True, exist_ok=True)
    summary.to_csv(output / "plateau.csv", index=False)
    early = "the median accuracy of the first three evaluations of FedIT's runs of the task"
    given = early if chance is None else f"{chance:g}"
    tables = {"Leaving the plateau": leaving_table(summary)} | {TITLES[x]: round_table(summary, x) for x in MEASURES}
    texts = ["# Plateau", "\n".join(f"- {line}" for line in lines), EXPLANATION.format(chance=given)]
    texts += [f"## {title}\n\n{as_markdown({'': table}, [])}" for title, table in tables.items()]
    (output / "plateau.md").write_text("\n\n".join(texts) + "\n", "utf-8")
    plot_plateau(runs, summary, output / "plateau.png")


def leaving_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Lay out when each setting leaves the plateau, and its scores."""
    records = summary.to_dict("records")
    columns = {
        "threshold": [f"{row['threshold']:.3f}" for row in records],
        "leaves in round": [_leaving(row) for row in records],
        "by seed": [row["left_by_seed"] for row in records],
        "back below": [row["back_by_seed"] for row in records],
        "minus FedIT": [_difference(row) for row in records],
        "the same, over thresholds": [_over(row) for row in records],
        "minus FedIT by seed": [row["minus_fedit_by_seed"] or "–" for row in records],
        "last accuracy": [_spread(row, "last", ".3f") for row in records],
        "best accuracy": [_spread(row, "best", ".3f") for row in records],
    }
    return pd.DataFrame(columns, index=_places(summary))


def round_table(summary: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Lay out a measure in some rounds, with its ratio to FedIT's."""
    columns = {}
    for number in ROUNDS:
        if f"{measure}_{number}_mean" in summary:
            columns[f"round {number}"] = [_with_ratio(row, f"{measure}_{number}") for row in summary.to_dict("records")]
    return pd.DataFrame(columns, index=_places(summary))


def _places(summary: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(summary[PLACE])


def _leaving(row: Mapping[str, Any]) -> str:
    if row["never"] == row["seeds"]:
        return f"> {row['rounds']}"
    if row["never"]:
        return f"> {row['left_at_least']:.1f}, {row['never']} of {row['seeds']} seeds never; no interval"
    return _interval(row, "left", ".1f")


def _difference(row: Mapping[str, Any]) -> str:
    if not row["minus_fedit_by_seed"]:
        return "–"
    return (
        "not every run leaves; no interval" if math.isnan(row["minus_fedit_mean"]) else _interval(row, "minus_fedit", "+.1f")
    )


def _over(row: Mapping[str, Any]) -> str:
    return "–" if math.isnan(row["minus_fedit_over_mean"]) else _interval(row, "minus_fedit_over", "+.1f")


def _interval(row: Mapping[str, Any], name: str, form: str) -> str:
    mean, low, high = (row[f"{name}_{x}"] for x in ("mean", "low", "high"))
    return f"{mean:{form}}" + (" (one seed)" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def _spread(row: Mapping[str, Any], name: str, form: str) -> str:
    mean, deviation = row[f"{name}_mean"], row[f"{name}_std"]
    if math.isnan(mean):
        return "–"
    return f"{mean:{form}}" + ("" if math.isnan(deviation) else f" ± {deviation:{form}}")


def _with_ratio(row: Mapping[str, Any], name: str) -> str:
    ratio = "" if math.isnan(row[f"{name}_ratio_mean"]) else f" (× {_spread(row, f'{name}_ratio', '.2f')})"
    return _spread(row, name, ".3g") + ratio


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of fedrot compare, finished or not")
    parser.add_argument("--output", required=True, type=Path, help="the folder to write to")
    parser.add_argument("--chance", type=float, help="the accuracy on the plateau (default: of the first evaluations)")
    arguments = parser.parse_args()
    report(arguments.folders, arguments.output, arguments.chance)
