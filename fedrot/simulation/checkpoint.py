"""What a run needs to go on after an interrupt: the server's tensors and the round, in one file, never half written."""

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], rounds_done: int) -> None:
    """Replace the folder's checkpoint."""
    temporary = folder / f".{CHECKPOINT}"
    copies = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    save_file(copies, temporary, metadata={"rounds_done": str(rounds_done)})
    os.replace(temporary, folder / CHECKPOINT)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor] | None, int]:
    """The server's tensors and the number of rounds done; None and 0 without a checkpoint."""
    if not (folder / CHECKPOINT).exists():
        return None, 0
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["rounds_done"])  # noqa: SIM118


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
