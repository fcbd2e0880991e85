"""When rotation matters: what it adds to plain averaging, by condition and start, from finished comparisons.

for name in adamw-lr sgd-lr local-steps alphas; do fedrot compare --preset regime-$name --output runs/regime-$name; done
python -m benchmarks.regime runs/regime-* --output docs/images/regime.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_STARTS = {"shared": "C0", "independent": "C1"}


def gains(rows: pd.DataFrame, field: str) -> pd.DataFrame:
    """Subtract FedIT's accuracy from FedRot's (λ = 1) after the first two and the last round, by run.

    Args:
        rows: the results.csv of a comparison.
        field: the field that it varies.

    Returns:
        A row per start, value and seed: early, the mean over the first two rounds; last; and error, FedIT's relative error
        after the first round.
    """
    keys = ["start", field, "seed"]
    fedit = rows[rows["method"] == "fedit"].set_index([*keys, "round"])
    fedrot = rows[(rows["method"] == "fedrot") & (rows["strength"] == 1)].set_index([*keys, "round"])
    gained = (fedrot["accuracy"] - fedit["accuracy"]).rename("gained").reset_index()
    first, second, *_, last = sorted(gained["round"].unique())  # from 1; in the files of fedrot 0.1, from 0
    in_round = {number: gained[gained["round"] == number].set_index(keys)["gained"] for number in (first, second, last)}
    error = fedit["relative_error"].reset_index()
    error = error[error["round"] == first].set_index(keys)["relative_error"]
    early = (in_round[first] + in_round[second]) / 2
    return pd.DataFrame({"early": early, "last": in_round[last], "error": error}).reset_index()


def _panel(axis: Axes, table: pd.DataFrame, field: str, measure: str) -> None:
    values = sorted(table[field].unique())
    for start, colour in _STARTS.items():
        some = table[table["start"] == start].groupby(field)[measure]
        mean, deviation = some.mean(), some.std()
        places = [values.index(value) for value in mean.index]
        axis.errorbar(places, mean, deviation, color=colour, marker="o", capsize=3, label=f"{start} start")
    axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axis.grid(alpha=0.3)


def plot(folders: Sequence[Path], path: Path) -> None:
    """Plot a column per comparison, whose rows are the gain early, the gain at the end, and FedIT's error in round 1."""
    labels = {
        "early": "accuracy gained,\nrounds 1 and 2",
        "last": "accuracy gained,\nlast round",
        "error": "FedIT's relative error,\nround 1",
    }
    figure = Figure(figsize=(3.2 * len(folders), 7.5))
    axes = figure.subplots(len(labels), len(folders), sharey="row", squeeze=False)
    for column, folder in enumerate(folders):
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        (field,) = config["vary"]
        table = gains(pd.read_csv(folder / "results.csv"), field)
        for axis, (measure, label) in zip(axes[:, column], labels.items(), strict=True):
            _panel(axis, table, field, measure)
            if measure != "error":
                axis.axhline(0, color="grey", linewidth=1)
            if column == 0:
                axis.set_ylabel(label)
        axes[-1, column].set_xlabel(f"{field}, {config['optimizer']}")
    axes[0, 0].legend()
    figure.suptitle("FedRot (λ = 1) against FedIT")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="finished comparisons that each vary one field")
    parser.add_argument("--output", required=True, type=Path, help="the PNG to write")
    arguments = parser.parse_args()
    plot(arguments.folders, arguments.output)
