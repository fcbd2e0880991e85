"""What a strategy needs to go on after an interrupt, in the folder of its checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..server.checkpoint import load_checkpoint, read_metadata, save_checkpoint

State = dict[str, Tensor]
_ADAPTER, _OPTIMIZER, _BASE = "adapter", "optimizer", "base-"


@dataclass
class Progress:
    """A run between two rounds.

    Attributes:
        adapter: the global adapter; empty before the first round.
        optimizer: the server optimizer's state; empty without one.
        base_updates: every change of the base weights so far.
        rounds_done: the number of rounds.
    """

    adapter: State = field(default_factory=dict)
    optimizer: State = field(default_factory=dict)
    base_updates: list[State] = field(default_factory=list)
    rounds_done: int = 0


def save_progress(folder: Path, progress: Progress, options: Mapping[str, Any]) -> None:
    """Replace the folder's checkpoint, whole or not at all.

    Args:
        folder: is made if need be.
        progress: after a round.
        options: of the run, without which going on would be another run.
    """
    parts = {_ADAPTER: progress.adapter, _OPTIMIZER: progress.optimizer}
    parts |= {f"{_BASE}{number}": update for number, update in enumerate(progress.base_updates)}
    tensors = {f"{part}/{key}": x for part, state in parts.items() for key, x in state.items()}
    save_checkpoint(folder, tensors, progress.rounds_done, options=json.dumps(options))


def load_progress(folder: Path, options: Mapping[str, Any]) -> Progress:
    """The folder's checkpoint; that of a new run, if there is none.

    Raises:
        ValueError: it is of a run with other options.
    """
    tensors, rounds_done = load_checkpoint(folder)
    saved = json.loads(read_metadata(folder).get("options", "{}"))
    if changed := [f"{name} {saved.get(name)}" for name in options if rounds_done and saved.get(name) != options[name]]:
        raise ValueError(f"{folder} was run with {', '.join(changed)}; resume it as it was, or start another run")
    parts: dict[str, State] = {_ADAPTER: {}, _OPTIMIZER: {}}
    for full, x in (tensors or {}).items():
        part, key = full.split("/", 1)
        parts.setdefault(part, {})[key] = x
    base = [parts[f"{_BASE}{number}"] for number in range(len(parts) - 2)]
    return Progress(parts[_ADAPTER], parts[_OPTIMIZER], base, rounds_done)


def check_no_checkpoint(folder: Path) -> None:
    """Raise FileExistsError if there is one: results never overwrite anything."""
    if rounds_done := read_metadata(folder).get("rounds_done"):
        raise FileExistsError(
            f"{folder} has a checkpoint, of round {rounds_done}; go on from it with resume=True, or name another folder"
        )
