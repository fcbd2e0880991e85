"""Checkpoints: the server's tensors and the number of rounds done, in one file that is never half written."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..adapters.files import replace_file

CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], rounds_done: int, **metadata: str) -> None:
    """Replace the folder's checkpoint; the folder is made if there is none.

    Args:
        folder: the folder of a run.
        tensors: the server's tensors, by name.
        rounds_done: the number of rounds done.
        **metadata: texts to keep beside the tensors.
    """
    copies = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with replace_file(folder / CHECKPOINT) as temporary:
        save_file(copies, temporary, metadata={"rounds_done": str(rounds_done), **metadata})


def read_metadata(folder: Path) -> dict[str, str]:
    """The texts beside the tensors of a checkpoint; empty without a checkpoint."""
    if not (folder / CHECKPOINT).exists():
        return {}
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return dict(file.metadata())


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor] | None, int]:
    """The server's tensors and the number of rounds done; None and 0 without a checkpoint."""
    if not (folder / CHECKPOINT).exists():
        return None, 0
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["rounds_done"])  # noqa: SIM118
