"""Embedded models on disk, so that they are pretrained once."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ...adapters.files import new_folder

_DIGEST, _FILES = "sha256", ("config.json", "model.safetensors")


def cached_model(
    name: str, kind: type[PreTrainedModel], key: Mapping[str, Any], build: Callable[[], PreTrainedModel]
) -> PreTrainedModel:
    """The model that ``build`` makes, from the cache if it is there whole.

    Args:
        name: of the model.
        kind: its class.
        key: what determines it beside the versions of torch and transformers; JSON.
        build: makes it; deterministic.
    """
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    determined_by = json.dumps({**key, **versions}, sort_keys=True)
    folder = cache_folder() / f"{name}-{digest(determined_by.encode())[:16]}"
    if not _is_whole(folder):
        model = build()
        try:
            _write(model, folder)
        except OSError:  # a home that cannot be written, or another process was faster: this run needs no cache
            return model.eval()
    return kind.from_pretrained(folder).eval()


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/fedrot``, or ``~/.cache/fedrot``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedrot"


def digest(content: bytes) -> str:
    """SHA-256, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether the files are those that were written."""
    paths = [folder / file for file in _FILES]
    return all(path.is_file() for path in [*paths, folder / _DIGEST]) and (folder / _DIGEST).read_text("utf-8") == (
        _digest_of(paths)
    )


def _digest_of(paths: list[Path]) -> str:
    return digest(b"".join(path.read_bytes() for path in paths))


def _write(model: PreTrainedModel, folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        (temporary / _DIGEST).write_text(_digest_of([temporary / file for file in _FILES]), "utf-8")
