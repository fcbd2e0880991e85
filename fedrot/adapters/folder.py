"""PEFT folders (adapter_config.json and adapter_model.safetensors) in and out. What a client sent is data, never code."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UpdateError
from .config import CONFIG, check_lora
from .files import new_folder
from .foreign import explain_config, explain_file, explain_folder, explain_keys
from .keys import SAVED_DTYPES, TensorSpec, check_tensor, describe, parse_factor, parse_key
from .shards import check_shard, find_shards

WEIGHTS = "adapter_model.safetensors"
REPORT = "aggregation.json"
_MAX_CONFIG_BYTES = 1 << 20
_WRITE_IT = "pass a folder that save_pretrained wrote"


class AdapterFolder(Mapping[str, Tensor]):
    """A PEFT LoRA folder, read tensor by tensor: opening it reads the configuration and the headers only.

    Args:
        path: the folder: with adapter_model.safetensors, or with shards and their index; or the folder above, where
            save_pretrained puts an adapter that has a name.
        client: the client's name in errors.

    Attributes:
        path: the folder that holds adapter_config.json.
        config: the content of adapter_config.json.
        specs: key → shape and dtype; keys without what wrappers such as torch.compile put into them.

    Raises:
        UpdateError: no PEFT LoRA folder in safetensors format, a truncated one, or a variant that cannot be rotated.
    """

    def __init__(self, path: str | os.PathLike[str], client: str):
        self.client = client
        self.path = _find_adapter(Path(path), client)
        self.config = self._read_config()
        self._files = self._open_files()
        if not any(map(parse_factor, self._files)) and (why := explain_keys(self._files)):
            raise UpdateError(f"{client}: {why}")
        self._keys = {self._saved_key(key): key for key in self._files}
        self.specs = {saved: self._spec(saved, key) for saved, key in self._keys.items()}
        if len(self._keys) < len(self._files):
            twice = next(key for key in self._files if key not in self._keys.values())
            raise UpdateError(
                f"{client}, {twice}: its tensor is there twice, with and without the wrapper of a compiled model"
            )

    def _read_config(self) -> dict[str, Any]:
        file = self.path / CONFIG
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise UpdateError(f"{self.client}: {file} is larger than {_MAX_CONFIG_BYTES} bytes; send a PEFT configuration")
        try:
            config: dict[str, Any] = json.loads(file.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            what = explain_file(file) or f"is not JSON ({error}); send it again"
            raise UpdateError(f"{self.client}: {file} {what}") from error
        if why := explain_config(config):
            raise UpdateError(f"{self.client}: {file} {why}")
        check_lora(config, f"{self.client}: {file}")
        return config

    def _open_files(self) -> dict[str, Any]:
        """Open the safetensors files; return key → its file."""
        single, shards = self.path / WEIGHTS, find_shards(self.path, self.client)
        if not shards:
            if not single.is_file():
                raise UpdateError(f"{self.client}: {self.path} has no {WEIGHTS}; {explain_folder(self.path) or _WRITE_IT}")
            return dict.fromkeys(*self._open(single))
        if single.exists():
            raise UpdateError(
                f"{self.client}: {self.path} has {WEIGHTS} and shards of another save; remove those that are out of date"
            )
        files: dict[str, Any] = {}
        for name, listed in shards.items():
            keys, file = self._open(self.path / name)
            check_shard(str(self.path / name), set(keys), listed, self.client)
            files |= dict.fromkeys(keys, file)
        return files

    def _open(self, file: Path) -> tuple[list[str], Any]:
        """Open a safetensors file, whose methods have no type information; return its keys and the file."""
        try:
            opened: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            why = explain_file(file) or f"is not a whole safetensors file ({error}); send it again"
            raise UpdateError(f"{self.client}: {file} {why}") from error
        return list(opened.keys()), opened

    def _saved_key(self, key: str) -> str:
        """The key without what wrappers, such as torch.compile's, put between the names of modules."""
        saved, name = parse_key(key)
        if name is not None:
            raise UpdateError(f"{self.client}, {key}: not a key that save_pretrained writes; that is {saved}")
        return saved

    def _spec(self, saved: str, key: str) -> TensorSpec:
        view = self._files[key].get_slice(key)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        # A dtype that PyTorch has no name for here is none that can be averaged.
        spec = TensorSpec(shape, SAVED_DTYPES.get(dtype, torch.complex64))
        check_tensor(saved, spec, self.client, dtype, self._files)
        return spec

    def __getitem__(self, key: str) -> Tensor:
        given = self._keys[key]
        tensor: Tensor = self._files[given].get_tensor(given)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def _find_adapter(path: Path, client: str) -> Path:
    """The folder of the adapter: the path, or the one folder in it that has a configuration; UpdateError otherwise."""
    if path.is_file():
        if path.parent.joinpath(CONFIG).is_file():
            raise UpdateError(f"{client}: {path} is a file; pass the folder that holds it, {path.parent}")
        raise UpdateError(f"{client}: {path} {explain_file(path) or f'is a file; {_WRITE_IT}'}")
    if not path.is_dir():
        raise UpdateError(f"{client}: there is no folder {path}; {_WRITE_IT}")
    if path.joinpath(CONFIG).is_file():
        return path
    named = sorted(folder for folder in path.iterdir() if not folder.is_symlink() and folder.joinpath(CONFIG).is_file())
    if len(named) == 1:
        return named[0]
    if named:
        names = ", ".join(folder.name for folder in named[:10]) + (" and others" if named[10:] else "")
        raise UpdateError(f"{client}: {path} holds the adapters {names}; pass the folder of one, such as {named[0]}")
    raise UpdateError(f"{client}: {path} has no {CONFIG}; {explain_folder(path) or _WRITE_IT}")


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the state dict and the configuration of a PEFT LoRA folder.

    Returns:
        The tensors by the keys of the file, without what wrappers such as torch.compile put into them, and the content of
        adapter_config.json.

    Raises:
        UpdateError: no PEFT LoRA folder in safetensors format, a truncated one, or a variant that cannot be rotated.
    """
    folder = AdapterFolder(path, "the adapter")
    return dict(folder), folder.config


def write_adapter(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
) -> None:
    """Write a PEFT folder, whole or not at all.

    Args:
        path: the folder, which must not exist.
        state_dict: one adapter's tensors, with or without the adapter's name in the keys.
        config: the content of adapter_config.json.
        report: what is written beside it as aggregation.json.

    Raises:
        FileExistsError: the path exists.
        ValueError: a configuration that is not of LoRA, or two adapters in one state dict.
    """
    if not config or config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: config must be the adapter_config.json of a LoRA adapter, as read_adapter returns it")
    _, keys = describe(state_dict, str(path))
    with new_folder(path) as folder:
        # Copies: the format refuses tensors that share memory.
        tensors = {saved: state_dict[key].detach().cpu().clone().contiguous() for saved, key in keys.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        if report is not None:
            (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
