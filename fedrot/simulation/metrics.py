"""A run's metrics: a JSON object per round and line, never half written; and which of them tables and plots show."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..adapters.files import replace_file

SCORES = {"accuracy": "accuracy", "exact_match": "exact match", "pass_at_1": "pass@1", "loss": "loss"}


def read_metrics(path: Path, rounds_done: int) -> list[dict[str, Any]]:
    """Read the metrics of the first rounds.

    A line that an interrupt cut short is left out, and so are later rounds, which were not finished.

    Args:
        path: a file of ``write_metrics``. Without one there are no metrics.
        rounds_done: how many rounds were finished.

    Raises:
        ValueError: a file of fedrot 0.1, which counted rounds from 0.
    """
    rows: list[dict[str, Any]] = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["round"] < 1:
            raise ValueError(f"{path} counts rounds from {row['round']}, as fedrot 0.1 did; start another run")
        if row["round"] > rounds_done:
            break
        rows.append(row)
    return rows


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the metrics file.

    Args:
        path: the file.
        rows: an object per round, whose "round" counts from 1.
    """
    with replace_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), "utf-8")


def shown_score(rows: pd.DataFrame) -> str:
    """Choose the score to show: the first of accuracy, exact_match, pass_at_1 and loss that has values.

    Raises:
        ValueError: none has.
    """
    for name in SCORES:
        if name in rows and rows[name].notna().any():
            return name
    raise ValueError(f"no round was evaluated: the rows have none of {', '.join(SCORES)}")


def shown_measures(rows: pd.DataFrame) -> list[str]:
    """Choose the columns to show: the score and, unless no run measured it (``report_error``), relative_error."""
    errors = ["relative_error"] if "relative_error" in rows and rows["relative_error"].notna().any() else []
    return [shown_score(rows), *errors]
