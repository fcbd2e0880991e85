"""Unions: the layout and the configuration of one adapter with all modules of several."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.checks import check_device, check_ranks, not_finite
from ..adapters.config import PREFIX, plain_config, rank_fields
from ..adapters.keys import TensorSpec, parse_factor
from ..adapters.layout import Layout
from ..adapters.update import Update
from ..errors import UpdateError

# Initialisations that leave the base weights as they are. After any other, s·B·A is the difference to another base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Fields by which the same factors mean something else.
_MUST_AGREE = (
    "fan_in_fan_out",
    "bias",
    "lora_bias",
    "use_qalora",
    "qalora_group_size",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
# Fields that choose modules, and that an expression for the modules' names replaces.
_WHICH_MODULES = ("exclude_modules", "layers_to_transform", "layers_pattern")


def check_plain(adapter: Update, first: Update) -> None:
    """Raise UpdateError unless an adapter is a plain s·B·A, all finite, whose factors mean what the first adapter's do."""
    config, name = adapter.config, adapter.name
    if config is None:
        raise UpdateError(f"{name} has no LoRA configuration and so no known scaling; pass a folder or (state dict, config)")
    if config.get("use_dora"):
        raise UpdateError(f"{name}: DoRA normalises W + s·B·A, so that its updates do not add up; merge LoRA adapters")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise UpdateError(
            f"{name}: init_lora_weights {start!r} changes the base weights, and s·B·A is not its update; convert it to a "
            "plain adapter (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    assert first.config is not None
    for field in _MUST_AGREE:
        if (config.get(field) or None) != (first.config.get(field) or None):
            raise UpdateError(
                f"{name} has {field} = {config.get(field)!r}, but {first.name} has {first.config.get(field)!r}; they must "
                "agree to be merged"
            )
    check_device(adapter, first)
    check_ranks(adapter, Layout(adapter.specs, name).adapters)
    if found := not_finite(adapter):
        raise UpdateError(f"{name}, {found}; leave it out")


def without_base(adapters: Sequence[Update]) -> tuple[list[Update], dict[str, Tensor]]:
    """Separate adapters from base weights that PEFT saved with them, as it does for embeddings.

    Returns:
        The adapters without base weights, and the base weights by key.

    Raises:
        UpdateError: adapters whose base weights differ.
    """
    base: dict[str, Tensor] = {}
    bare = []
    for adapter in adapters:
        keys = [key for key in adapter.specs if key.endswith(".base_layer.weight")]
        for key in keys:
            x = adapter[key].detach()
            if not torch.equal(base.setdefault(key, x.clone()), x):
                raise UpdateError(f"{adapter.name}, {key} {tuple(x.shape)}: the adapters' base weights differ here")
        specs = {key: spec for key, spec in adapter.specs.items() if key not in keys}
        bare.append(replace(adapter, specs=specs) if keys else adapter)
    return bare, base


def union_layout(adapters: Sequence[Update], rank: int) -> Layout:
    """The layout of all modules of several adapters, in the widest dtypes.

    Args:
        adapters: the adapters.
        rank: the least rank of every module; larger ranks of adapters stay.

    Raises:
        UpdateError: shapes that differ in more than ranks, or a tensor that is no factor and that some adapters lack.
    """
    specs: dict[str, TensorSpec] = {}
    whose: dict[str, Update] = {}
    for adapter in adapters:
        for key, spec in adapter.specs.items():
            parsed = parse_factor(key)
            axis = None if parsed is None else "AB".index(parsed.factor)
            other = whose.setdefault(key, adapter)
            if _without_axis(spec.shape, axis) != _without_axis(other.specs[key].shape, axis):
                raise UpdateError(
                    f"{adapter.name}, {key}: shape {spec.shape}, but {other.name} has {other.specs[key].shape}; adapters of "
                    "one base model can be merged"
                )
            known = specs.get(key, spec)
            shape = list(spec.shape)
            if axis is not None:
                shape[axis] = max(known.shape[axis], spec.shape[axis], rank)
            specs[key] = TensorSpec(tuple(shape), torch.promote_types(known.dtype, spec.dtype))
    for key in specs:
        lacking = next((adapter for adapter in adapters if key not in adapter.specs), None)
        if lacking and parse_factor(key) is None and not key.endswith(".lora_B.bias"):
            raise UpdateError(
                f"{lacking.name} lacks {key}, which {whose[key].name} has; tensors that are no LoRA factors (heads, saved "
                "modules) can be merged if all adapters have them, or none: leave them out, or add the base model's"
            )
    return Layout(specs, "the merged adapter")


def _without_axis(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """The shape without one axis, or as it is."""
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def union_config(adapters: Sequence[Update], layout: Layout, s: Mapping[str, float]) -> dict[str, Any]:
    """The adapter_config.json of one adapter with all modules of several; other fields are the first adapter's.

    Args:
        adapters: the adapters.
        layout: the layout of their union, whose ranks the configuration has.
        s: module → scaling.
    """
    config = dict(adapters[0].config or {}) | rank_fields({a.module: a.rank for a in layout.adapters}, s)
    config |= {"use_rslora": False, "init_lora_weights": True, "target_modules": _modules(adapters, layout)}
    if isinstance(config["target_modules"], str):
        config |= dict.fromkeys(_WHICH_MODULES)
    return plain_config(config)


def _modules(adapters: Sequence[Update], layout: Layout) -> list[str] | str:
    """The union of the adapters' target_modules if all are lists of names, or else an expression for the modules' names."""
    configs = [adapter.config or {} for adapter in adapters]
    lists = [x if isinstance(x := config.get("target_modules"), list) else None for config in configs]
    if None not in lists and not any(config.get(field) for config in configs for field in _WHICH_MODULES):
        return sorted({name for x in lists for name in x or ()})
    return "|".join(re.escape(a.module.removeprefix(PREFIX)) for a in layout.adapters)
