"""A run's metrics: a JSON object per round and line, never half written."""

import json
import os
from pathlib import Path


def read_metrics(path: Path, rounds_done: int) -> list[dict]:
    """The metrics of the first rounds; a line that an interrupt cut short, or of a later round, is left out."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["round"] >= rounds_done:
            break
        rows.append(row)
    return rows


def write_metrics(path: Path, rows: list[dict]) -> None:
    """Replace the metrics file, one JSON object per line."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), "utf-8")
    os.replace(temporary, path)
