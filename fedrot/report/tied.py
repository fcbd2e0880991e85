"""Weights that two modules of a model share, and base updates that would change both."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.experts import parse_module
from ..adapters.keys import parse_factor, without_wrappers
from ..errors import UpdateError

Factors = tuple[Tensor, Tensor]


def leave_out_copies(model: Any, base_update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A base update without what would be added to one weight a second time.

    Args:
        model: a ``peft.PeftModel``.
        base_update: key → factor, under the keys of a saved adapter.

    Raises:
        UpdateError: a module that the model lacks, or a weight that another module shares without sharing the update.
    """
    updates = {parse_module(key): _factors(base_update, key) for key in base_update if _is_A(key)}
    owners = _owners(model)
    once = dict(base_update)
    done: dict[int, str] = {}  # address of a weight → the module by which it changes
    for module, factors in updates.items():
        weight = _weight(model, module)
        if weight is None:
            continue
        address = weight.data_ptr()
        for other in owners.get(address, ()):
            if other != module and not _shares(model, module, other, factors, updates):
                raise UpdateError(
                    f"the base update, {module}: its weight {tuple(weight.shape)} is one tensor with that of {other} (tied "
                    "weights), which would change too; nothing was changed. Train both with ensure_weight_tying=True, untie "
                    "them (tie_word_embeddings=False), or take a method that leaves the base weights alone"
                )
        if address in done:
            once = {key: x for key, x in once.items() if parse_module(key) != module}
        done.setdefault(address, module)
    return once


def _is_A(key: str) -> bool:
    parsed = parse_factor(key)
    return parsed is not None and parsed.factor == "A"


def _factors(base_update: Mapping[str, Tensor], key_A: str) -> Factors:
    parsed = parse_factor(key_A)
    if parsed is None or parsed.partner not in base_update:
        raise UpdateError(f"the base update, {key_A}: without its other factor")
    return base_update[key_A], base_update[parsed.partner]


def _owners(model: Any) -> dict[int, list[str]]:
    """Address of a weight → the modules that compute with it, as a saved adapter's keys name them."""
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        module, _, end = without_wrappers(name).rpartition(".")
        # What a saved module replaces is not computed with.
        if end == "weight" and ".original_module" not in name and ".lora_" not in name and p.numel():
            named = owners.setdefault(p.data_ptr(), [])
            named += {module.removesuffix(".base_layer")} - {*named}
    return owners


def _weight(model: Any, module: str) -> Tensor | None:
    """The weight of a module; None for a module whose parameters have names of their own, such as experts."""
    try:
        found = model.get_submodule(module)
    except AttributeError as error:
        raise UpdateError(
            f"the base update, {module}: the model has no such module; fold it into the clients' model"
        ) from error
    base = found.get_base_layer() if hasattr(found, "get_base_layer") else found
    weight = getattr(base, "weight", None)
    return weight if isinstance(weight, nn.Parameter | Tensor) and weight.dim() == 2 else None


def _shares(model: Any, module: str, other: str, factors: Factors, updates: Mapping[str, Factors]) -> bool:
    """Whether two modules of one weight get one update: it is in the base update for both, or both carry one adapter."""
    if other in updates:
        return _are_transposes(factors, updates[other])
    mine, theirs = (_active_factors(model, name) for name in (module, other))
    return mine is not None and theirs is not None and _are_transposes(mine, theirs)


def _are_transposes(mine: Factors, theirs: Factors) -> bool:
    return all(x.shape == y.mT.shape and torch.equal(x, y.mT) for x, y in zip(mine, reversed(theirs), strict=True))


def _active_factors(model: Any, module: str) -> Factors | None:
    """A and B of the active adapter on a module."""
    layer = model.get_submodule(module)
    for name in model.active_adapters:
        if name in getattr(layer, "lora_A", {}):
            return layer.lora_A[name].weight, layer.lora_B[name].weight
        if name in getattr(layer, "lora_embedding_A", {}):
            return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return None
