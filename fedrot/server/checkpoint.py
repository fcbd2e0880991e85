"""What a run needs to go on after an interrupt: the server's tensors and the round, in one file, never half written."""

import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], rounds_done: int, **metadata: str) -> None:
    """Replace the folder's checkpoint; the folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{CHECKPOINT}"
    copies = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    save_file(copies, temporary, metadata={"rounds_done": str(rounds_done), **metadata})
    os.replace(temporary, folder / CHECKPOINT)


def read_metadata(folder: Path) -> dict[str, str]:
    """What was saved beside the tensors of a checkpoint; empty without one."""
    if not (folder / CHECKPOINT).exists():
        return {}
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return file.metadata()


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor] | None, int]:
    """The server's tensors and the number of rounds done; None and 0 without a checkpoint."""
    if not (folder / CHECKPOINT).exists():
        return None, 0
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["rounds_done"])  # noqa: SIM118
