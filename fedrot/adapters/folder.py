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
from .keys import TensorSpec, describe, parse_key

WEIGHTS = "adapter_model.safetensors"
REPORT = "aggregation.json"
DTYPES_SAVED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_MAX_CONFIG_BYTES = 1 << 20


class AdapterFolder(Mapping[str, Tensor]):
    """A PEFT LoRA folder, read tensor by tensor: opening it reads the configuration and the header only.

    Args:
        path: the folder.
        client: the client's name in errors.

    Attributes:
        config: the content of adapter_config.json.
        specs: key → shape and dtype.

    Raises:
        UpdateError: no PEFT LoRA folder in safetensors format, a truncated one, or a variant that cannot be rotated.
    """

    def __init__(self, path: str | os.PathLike[str], client: str):
        self.path = Path(path)
        self.client = client
        self.config = self._read_config()
        file = self.path / WEIGHTS
        if not file.is_file():
            if (self.path / "adapter_model.bin").exists():
                raise UpdateError(
                    f"{client}: {self.path}/adapter_model.bin is a pickle, which could run code; "
                    "save the adapter as safetensors (save_pretrained does by default)"
                )
            raise UpdateError(f"{client}: {self.path} has no {WEIGHTS}; pass a folder written by save_pretrained")
        try:
            self._file = _open(file)
        except (SafetensorError, OSError) as error:
            raise UpdateError(f"{client}: {file} is not a whole safetensors file ({error}); send it again") from error
        self.specs = {key: self._spec(key) for key in self._file.keys()}  # noqa: SIM118, a safe_open is no mapping

    def _read_config(self) -> dict[str, Any]:
        file = self.path / CONFIG
        if not self.path.is_dir():
            raise UpdateError(f"{self.client}: there is no folder {self.path}")
        if not file.is_file():
            raise UpdateError(f"{self.client}: {self.path} has no {CONFIG}; pass a folder written by save_pretrained")
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise UpdateError(f"{self.client}: {file} is larger than {_MAX_CONFIG_BYTES} bytes; send a PEFT configuration")
        try:
            config: dict[str, Any] = json.loads(file.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UpdateError(f"{self.client}: {file} is not JSON ({error}); send it again") from error
        check_lora(config, f"{self.client}: {file}")
        return config

    def _spec(self, key: str) -> TensorSpec:
        view = self._file.get_slice(key)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if dtype not in DTYPES_SAVED:
            raise UpdateError(
                f"{self.client}, {key}: {dtype}, shape {shape}; only float16, bfloat16, float32 and float64 tensors can be "
                "averaged"
            )
        if parse_key(key)[0] != key:
            raise UpdateError(f"{self.client}, {key}: not a key that save_pretrained writes; that is {parse_key(key)[0]}")
        return TensorSpec(shape, DTYPES_SAVED[dtype])

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def _open(file: Path) -> Any:
    """Open a safetensors file, whose methods have no type information."""
    return safe_open(file, framework="pt")


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the state dict and the configuration of a PEFT LoRA folder.

    Returns:
        The tensors by the keys of the file, and the content of adapter_config.json.

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
