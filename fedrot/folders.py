"""PEFT folders (adapter_config.json and adapter_model.safetensors) in and out. What a client sent is data, never code."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UpdateError
from .keys import TensorSpec, describe, parse_key

WEIGHTS, CONFIG, REPORT = "adapter_model.safetensors", "adapter_config.json", "aggregation.json"
_MAX_CONFIG_BYTES = 1 << 20

DTYPES_SAVED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# What scales B·A: adapters that differ here do not mean the same by the same factors.
_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
# Virtual tokens have places; a mixture of two is another prompt, not the same one in another basis.
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
_REFUSED = {
    "target_parameters": "LoRA on the parameters of a mixture of experts stacks one adapter per expert in each factor",
    "use_bdlora": "block-diagonal factors",
    "kasa_config": "KaSA puts a diagonal between B and A",
    "monteclora_config": "MonteCLoRA samples between B and A",
}


class AdapterFolder(Mapping[str, Tensor]):
    """A PEFT LoRA folder, read tensor by tensor: opening it reads the configuration and the header only.

    Args:
        path: the folder.
        client: the name to use in errors.

    Raises:
        UpdateError: not a PEFT LoRA folder in safetensors format, truncated, or a variant that cannot be rotated.
    """

    def __init__(self, path: str | os.PathLike, client: str):
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
            self._file = safe_open(file, framework="pt")
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
            config = json.loads(file.read_text("utf-8"))
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
        return self._file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def plain_config(config: Any) -> dict[str, Any]:
    """A ``peft.LoraConfig``, or what it holds, as adapter_config.json has it: lists for sets, strings for enumerations."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    return json.loads(json.dumps(dict(values), default=lambda x: sorted(x) if isinstance(x, set | frozenset) else str(x)))


def check_lora(config: Any, name: str) -> None:
    """Raise UpdateError unless this is the configuration of a LoRA adapter that can be rotated."""
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if peft_type != "LORA":
        instead = ": average the prompt_embeddings as they are" if peft_type in _PROMPTS else ""
        raise UpdateError(f"{name} describes peft_type {peft_type!r}; only LORA adapters have frames to align{instead}")
    for field, why in _REFUSED.items():
        if config.get(field):
            raise UpdateError(f"{name} sets {field} ({why}), which cannot be rotated")


def same_scaling(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the same factors mean the same update under both configurations."""
    return all((config.get(field) or None) == (other.get(field) or None) for field in _SCALING)


def check_scaling(
    config: dict[str, Any] | None,
    name: str,
    other: dict[str, Any] | None,
    other_name: str,
    fields: Sequence[str] = _SCALING,
) -> None:
    """Raise UpdateError unless the same factors mean the same update under both configurations, if there are two."""
    if config is None or other is None:
        return
    for field in fields:
        mine, theirs = config.get(field), other.get(field)
        if (mine or None) != (theirs or None):
            raise UpdateError(
                f"{name} has {field} = {mine!r} in its {CONFIG}, but {other_name} has {theirs!r}; "
                "all clients must use one LoRA configuration"
            )


def read_adapter(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the configuration of a PEFT LoRA folder.

    Raises:
        UpdateError: see ``AdapterFolder``.
    """
    folder = AdapterFolder(path, "the adapter")
    return dict(folder), folder.config


def write_adapter(
    path: str | os.PathLike,
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
) -> None:
    """Write a PEFT folder, whole or not at all.

    Args:
        path: must not exist.
        state_dict: one adapter's tensors, with or without the adapter's name in the keys.
        config: the content of adapter_config.json.
        report: written beside it as aggregation.json.

    Raises:
        FileExistsError: the path exists.
        ValueError: not a LoRA configuration, or two adapters in one state dict.
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


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill, which gets its name only if nothing went wrong."""
    path = Path(path)
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_new(path: str | os.PathLike) -> None:
    """Raise FileExistsError if the path exists: results never overwrite anything."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; choose another output folder or remove it first")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
