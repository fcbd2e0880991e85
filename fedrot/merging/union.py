"""Unions: the layout and the configuration of one adapter with all modules of several."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.checks import check_kind
from ..adapters.config import pattern_name, plain_config, rank_fields
from ..adapters.keys import TensorSpec, parse_factor
from ..adapters.layout import Layout
from ..adapters.meaning import start_of
from ..adapters.storage import Storage
from ..adapters.update import Update
from ..adapters.values import not_finite
from ..errors import UpdateError

# Fields that choose modules, and that an expression for the modules' names replaces.
_BASE, _VELORA = ".base_layer.weight", ".lora_velora_embed"
_WHICH_MODULES = ("exclude_modules", "layers_to_transform", "layers_pattern")


def check_plain(adapter: Update, first: Update) -> None:
    """Raise UpdateError unless an adapter is a plain s·B·A, all finite, whose factors mean what the first adapter's do."""
    config, name = adapter.config, adapter.name
    Layout(adapter.specs, name)  # refuses factors that do not fit each other
    if config is None:
        raise UpdateError(f"{name} has no LoRA configuration and so no known scaling; pass a folder or (state dict, config)")
    if config.get("use_dora"):
        raise UpdateError(f"{name}: DoRA normalises W + s·B·A, so that its updates do not add up; merge LoRA adapters")
    if (start := start_of(config)) is not None:
        raise UpdateError(
            f"{name}: init_lora_weights {start!r} changes the base weights, and s·B·A is not its update; convert it to a "
            "plain adapter (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    check_kind(adapter, first)
    if found := not_finite(adapter):
        raise UpdateError(f"{name}, {found}; leave it out")


def without_base(adapters: Sequence[Update]) -> tuple[list[Update], dict[str, Tensor]]:
    """Separate adapters from base weights that PEFT saved with them, as it does for embeddings, and from VeLoRA's tensors.

    VeLoRA's projections play a part in training only, and ΔW = s·B·A has none in it.

    Returns:
        The adapters without base weights, and the base weights by key.

    Raises:
        UpdateError: adapters whose base weights differ.
    """
    base: dict[str, Tensor] = {}
    bare = []
    for adapter in adapters:
        keys = [key for key in adapter.specs if key.endswith(_BASE)]
        for key in keys:
            x = adapter[key].detach()
            known = base.setdefault(key, x.clone())
            if not torch.equal(known, x):
                raise UpdateError(
                    f"{adapter.name}, {key} {tuple(x.shape)}: the adapters' base weights differ here, from "
                    f"{tuple(known.shape)} of another; resize the vocabularies to one, and merge adapters of one base model"
                )
        specs = {key: spec for key, spec in adapter.specs.items() if not key.endswith((_BASE, _VELORA))}
        bare.append(replace(adapter, specs=specs))
    return bare, base


def union_layout(adapters: Sequence[Update], rank: int) -> Layout:
    """The layout of all modules of several adapters, in the widest dtypes.

    Args:
        adapters: the adapters.
        rank: the least rank of every module; larger ranks of adapters stay.

    Raises:
        UpdateError: shapes that differ in more than ranks.
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
    parts = {part for adapter in adapters for keys in adapter.storage.parts.values() for part in keys}
    config |= {"use_rslora": False, "init_lora_weights": True, "velora_config": None}
    config["target_modules"] = _modules(adapters, [a.module for a in layout.adapters if a.key_A not in parts])
    targets = {name for adapter in adapters for name in (adapter.config or {}).get("target_parameters") or ()}
    if targets:  # PEFT adapts no parameters with dropout
        config |= {"target_parameters": sorted(targets), "lora_dropout": 0.0}
    if isinstance(config["target_modules"], str):
        config |= dict.fromkeys(_WHICH_MODULES)
    return plain_config(config)


def union_storage(adapters: Sequence[Update], layout: Layout, base: Sequence[str]) -> Storage:
    """Where the union of several adapters lies in a state dict.

    Args:
        adapters: the adapters.
        layout: the layout of their union.
        base: keys of base weights that are saved with it.

    Raises:
        UpdateError: experts of unlike number, parameters whose order no adapter has whole, or weights that only some
            adapters tie.
    """
    parts: dict[str, tuple[str, ...]] = {}
    holder: dict[str, str] = {}  # a canonical key → the key of a saved adapter that holds it
    whose: dict[str, Update] = {}
    for adapter in sorted(adapters, key=lambda x: -len(x.storage.parts)):
        for key, theirs in adapter.storage.parts.items():
            known = holder.setdefault(theirs[0], key)
            other = whose.setdefault(known, adapter)
            if parts.setdefault(known, theirs) != theirs:
                shapes = [x.storage.pack_specs(x.specs)[k].shape for x, k in ((adapter, key), (other, known))]
                raise UpdateError(
                    f"{adapter.name}, {key}: shape {shapes[0]} of {len(theirs)} experts, but {other.name} has "
                    f"{shapes[1]} of {len(parts[known])} in {known}; merge adapters of one base model, and of two "
                    "parameters of a module if one adapter has both"
                )
    copies: dict[str, str] = {}
    for adapter in adapters:
        copies |= adapter.storage.copies
    for key, original in copies.items():
        for adapter in adapters:
            own = next((k for k in (original, key) if k in adapter.specs), None)
            if own is not None and key not in adapter.storage.copies:
                raise UpdateError(
                    f"{adapter.name}, {own} {adapter.specs[own].shape}: another adapter has tied weights here ({key} "
                    f"repeats {original}, transposed), and this one has not; train both with ensure_weight_tying, or neither"
                )
    held = {part for keys in parts.values() for part in keys}
    saved = [*(key for key in layout.specs if key not in held), *parts, *copies, *base]
    return Storage({key: key for key in saved}, parts, copies)


def _modules(adapters: Sequence[Update], modules: Sequence[str]) -> list[str] | str:
    """The union of the adapters' target_modules if all are lists of names, or else an expression for the modules' names."""
    configs = [adapter.config or {} for adapter in adapters]
    lists = [x if isinstance(x := config.get("target_modules"), list) else None for config in configs]
    if None not in lists and all(config.get(field) in (None, []) for config in configs for field in _WHICH_MODULES):
        return sorted({name for x in lists for name in x or ()})
    return "|".join(sorted({re.escape(pattern_name(module)) for module in modules})) if modules else []
