"""The cache of embedded models on disk, so that they are pretrained once."""

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
    """Load a model from the cache, or build it and put it there if the cache does not hold it whole.

    Args:
        name: the model's name.
        kind: its class.
        key: everything that determines its weights beside the versions of torch and transformers; JSON.
        build: makes the model, deterministically.
    """
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    determined_by = json.dumps({**key, **versions}, sort_keys=True)
    folder = cache_folder() / f"{name}-{digest(determined_by.encode())[:16]}"
    if not _is_whole(folder):
        model = build()
        try:
            _write(model, folder)
        except OSError:  # a home that cannot be written, or another process was faster: this run needs no cache
            return _for_evaluation(model)
    return _for_evaluation(kind.from_pretrained(folder))


def _for_evaluation(model: PreTrainedModel) -> PreTrainedModel:
    model.train(False)
    return model


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/fedrot``, or ``~/.cache/fedrot``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedrot"


def digest(content: bytes) -> str:
    """Compute the SHA-256 of bytes, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds the files as they were written."""
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
