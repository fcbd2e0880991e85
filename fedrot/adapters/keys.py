"""The keys of PEFT state dicts: in a model, in a saved adapter, and what they name."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import UpdateError
from .foreign import explain_keys

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Saved modules have counters, such as BatchNorm's of its batches, which cannot be averaged and are carried along.
COUNTERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# The names of dtypes in safetensors files.
SAVED_DTYPES = MappingProxyType(
    dict(zip(("F16", "BF16", "F32", "F64"), DTYPES, strict=True))
    | dict(zip(("I64", "I32", "I16", "I8", "U8", "BOOL"), COUNTERS, strict=True))
)

# In a model the adapter's name stands in the key ("….lora_A.default.weight"), in a saved adapter it does not.
_NAME = r"(\.(?P<name>[^.]+))??"
_FACTOR = re.compile(rf"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB]){_NAME}(?P<end>\.weight|\.bias)?")
_MAGNITUDE = re.compile(rf"(?P<saved>.+\.lora_magnitude_vector){_NAME}(\.weight)?")
# VeLoRA compresses activations in training by it; ΔW = s·B·A stays.
_PROJECTION = re.compile(rf"(?P<saved>.+\.lora_velora_embed){_NAME}")
_TOKENS = re.compile(rf"(?P<saved>.+\.trainable_tokens_delta){_NAME}")
# What torch.compile, FSDP and activation checkpointing put between the names of modules, and DistributedDataParallel before.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.(?=base_model\.)"
)
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


def without_wrappers(name: str) -> str:
    """A name without what torch.compile and others put between the names of modules."""
    return _WRAPPERS.sub("", name)


@lru_cache(maxsize=65536)
def parse_key(key: str) -> tuple[str, str | None]:
    """The key under which PEFT saves the tensor of an unwrapped model, and the adapter's name if the given key holds one."""
    key = without_wrappers(key)
    if m := _FACTOR.fullmatch(key):
        return f"{m['module']}.lora_{m['embedding'] or ''}{m['factor']}{m['end'] or ''}", m["name"]
    if m := _MAGNITUDE.fullmatch(key) or _TOKENS.fullmatch(key) or _PROJECTION.fullmatch(key):
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
    named = [key for key in state_dict if isinstance(key, str)]
    if not any(map(factor_of, named)) and (why := explain_keys(named)):
        raise UpdateError(f"{client}: {why}")
    for key, x in state_dict.items():
        if not isinstance(key, str) or not isinstance(x, Tensor):
            raise UpdateError(f"{client}, {key!r}: expected tensors by name, got {type(x).__name__}")
        if x.is_meta or x.layout != torch.strided:
            raise UpdateError(f"{client}, {key}: not a dense tensor with data, shape {tuple(x.shape)}; send its values")
        if hasattr(x, "full_tensor"):  # a DTensor, of which this process has a part
            raise UpdateError(f"{client}, {key} {tuple(x.shape)}: a part of a sharded tensor; send its full_tensor()")
        if type(x) in (Tensor, Parameter) and x.numel() and not x.data_ptr():  # of subclasses it is no sign
            raise UpdateError(
                f"{client}, {key} {tuple(x.shape)}: its memory was freed, as FSDP does; gather its values first"
            )
        saved, adapter = parse_key(key)
        check_tensor(saved, TensorSpec(tuple(x.shape), x.dtype), client, f"{x.dtype}", state_dict)
        if adapter is not None:
            adapters.setdefault(adapter, key)
        if saved in original or len(adapters) > 1:
            other = original.get(saved) or next(iter(adapters.values()))
            raise UpdateError(
                f"{client}: {other} and {key} are of two adapters, or twice of one; "
                "send one, as peft.get_peft_model_state_dict(model, adapter_name=…) returns it"
            )
        specs[saved], original[saved] = TensorSpec(tuple(x.shape), x.dtype), key
    return specs, original


def check_tensor(saved: str, spec: TensorSpec, client: str, dtype: str, keys: Iterable[str]) -> None:
    """Raise UpdateError unless a tensor can be averaged, or carried along.

    Args:
        saved: its key in a saved adapter.
        spec: its shape and dtype.
        client: the client's name in errors.
        dtype: the dtype's name in errors.
        keys: all keys of the adapter.
    """
    where = f"{client}, {saved}"
    module = saved.removesuffix(".alpha")
    if module != saved and any(isinstance(key, str) and f"{module}.lora_" in key for key in keys):
        raise UpdateError(
            f"{where} {spec.shape}: α in a tensor of its own, as diffusers and ComfyUI write it; leave these keys "
            "out and give the LoRA configuration with that lora_alpha (alpha_pattern, where they differ), or multiply each "
            "lora_B by alpha / rank"
        )
    if 0 in spec.shape:
        raise UpdateError(
            f"{where}: shape {spec.shape}, no entries; were sharded parameters (ZeRO-3, FSDP) gathered before they were "
            "saved?"
        )
    if spec.dtype in COUNTERS and parse_factor(saved) is None and not is_unknown_to_lora(saved):
        return
    if spec.dtype not in DTYPES:
        raise UpdateError(
            f"{where}: {dtype}, shape {spec.shape}; only float16, bfloat16, float32 and float64 tensors can be averaged. "
            "Convert it, or leave this key out"
        )


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
    """Whether a key is LoRA's by its name, but names no tensor that plain LoRA, DoRA and VeLoRA have."""
    known = _FACTOR.fullmatch(saved) or _MAGNITUDE.fullmatch(saved) or _PROJECTION.fullmatch(saved)
    return not known and re.search(r"(^|\.)lora_", saved) is not None
