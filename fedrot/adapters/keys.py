"""The keys of PEFT state dicts: in a model, in a saved adapter, and what they name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import UpdateError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# In a model the adapter's name stands in the key ("….lora_A.default.weight"), in a saved adapter it does not.
_NAME = r"(\.(?P<name>[^.]+))??"
_FACTOR = re.compile(rf"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB]){_NAME}(?P<end>\.weight|\.bias)?")
_MAGNITUDE = re.compile(rf"(?P<saved>.+\.lora_magnitude_vector){_NAME}(\.weight)?")
_TOKENS = re.compile(rf"(?P<saved>.+\.trainable_tokens_delta){_NAME}")
_MODULE_TO_SAVE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<end>.+)")


@dataclass(frozen=True)
class TensorSpec:
    """The shape and dtype of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class FactorKey:
    """The parts of a factor's key.

    Attributes:
        module: the adapted module.
        factor: "A" or "B".
        partner: the key of the other factor.
    """

    module: str
    factor: str
    partner: str


@lru_cache(maxsize=65536)
def parse_key(key: str) -> tuple[str, str | None]:
    """The key under which PEFT saves the tensor, and the adapter's name if the given key holds one."""
    if m := _FACTOR.fullmatch(key):
        return f"{m['module']}.lora_{m['embedding'] or ''}{m['factor']}{m['end'] or ''}", m["name"]
    if m := _MAGNITUDE.fullmatch(key) or _TOKENS.fullmatch(key):
        return m["saved"], m["name"]
    if m := _MODULE_TO_SAVE.fullmatch(key):
        return f"{m['module']}.{m['end']}", m["name"]
    return key, None


def describe(state_dict: Mapping[str, Tensor], client: str) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The specs of a state dict's tensors.

    Args:
        state_dict: one adapter's tensors, with or without the adapter's name in the keys.
        client: the client's name in errors.

    Returns:
        Canonical key → spec, and canonical key → the caller's key.

    Raises:
        UpdateError: something that is no tensor, an unsupported dtype, or two adapters in one state dict.
    """
    specs: dict[str, TensorSpec] = {}
    original: dict[str, str] = {}
    adapters: dict[str, str] = {}
    for key, x in state_dict.items():
        if not isinstance(key, str) or not isinstance(x, Tensor):
            raise UpdateError(f"{client}, {key!r}: expected tensors by name, got {type(x).__name__}")
        if x.is_meta or x.layout != torch.strided:
            raise UpdateError(f"{client}, {key}: not a dense tensor with data, shape {tuple(x.shape)}; send its values")
        if x.dtype not in DTYPES:
            raise UpdateError(
                f"{client}, {key}: {x.dtype}, shape {tuple(x.shape)}; only float16, bfloat16, float32 and float64 tensors "
                "can be averaged, leave this key out"
            )
        saved, adapter = parse_key(key)
        if adapter is not None:
            adapters.setdefault(adapter, key)
        if saved in original or len(adapters) > 1:
            other = original.get(saved) or next(iter(adapters.values()))
            raise UpdateError(
                f"{client}: {other} and {key} are of two adapters; "
                "send one, as peft.get_peft_model_state_dict(model, adapter_name=…) returns it"
            )
        specs[saved], original[saved] = TensorSpec(tuple(x.shape), x.dtype), key
    return specs, original


@lru_cache(maxsize=65536)
def parse_factor(saved: str) -> FactorKey | None:
    """The parts of a saved factor's key; None for any other tensor, such as the bias of a lora_B."""
    m = _FACTOR.fullmatch(saved)
    if m is None or m["end"] == ".bias":
        return None
    other = "B" if m["factor"] == "A" else "A"
    return FactorKey(m["module"], m["factor"], f"{m['module']}.lora_{m['embedding'] or ''}{other}{m['end'] or ''}")


def factor_of(key: str) -> str | None:
    """The factor, "A" or "B", of a key with or without an adapter's name; None for any other key."""
    parsed = parse_factor(parse_key(key)[0])
    return parsed.factor if parsed else None


@lru_cache(maxsize=65536)
def is_unknown_to_lora(saved: str) -> bool:
    """Whether a key is LoRA's by its name, but names no tensor that plain LoRA and DoRA have."""
    known = _FACTOR.fullmatch(saved) or _MAGNITUDE.fullmatch(saved)
    return not known and re.search(r"(^|\.)lora_", saved) is not None
