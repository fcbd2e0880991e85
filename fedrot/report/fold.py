"""Adding a base update, which some methods leave for the base weights, to a model: PEFT merges it as an adapter."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapters.keys import without_wrappers
from ..errors import UpdateError
from .result import AggregationResult
from .tied import leave_out_copies

_NAME = "fedrot_base_update"
_PATTERNS = ("rank_pattern", "alpha_pattern")


def fold(model: Any, result: AggregationResult) -> None:
    """Add a result's ``base_update`` to the base weights of a PEFT model, in place.

    PEFT merges it, so that transposed weights (``fan_in_fan_out``), convolutions, embeddings, experts and quantised layers
    are treated as PEFT treats them.

    A base in half precision rounds what is added, and loses updates that are small beside its weights. A weight that two
    modules share (tied embeddings) is changed once, if both carry one adapter (``ensure_weight_tying``).

    Args:
        model: a ``peft.PeftModel``; its own adapter stays as it is.
        result: the result of an aggregation; one without a ``base_update`` changes nothing.

    Raises:
        UpdateError: no PeftModel, one that lacks a module of the update or has it in another shape, or a weight that a
            module without that adapter shares. The model is then as it was.
    """
    if result.base_update is not None:
        merge_into_base(model, result.base_update, result.base_config or {})


def merge_into_base(model: Any, base_update: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Add one base update to the base weights of a PEFT model; see ``fold``.

    Args:
        model: a ``peft.PeftModel``.
        base_update: key → factor, under the keys of a saved adapter.
        config: the update's adapter_config.json.
    """
    from peft import LoraConfig, PeftModel  # an aggregation needs no PEFT, a PeftModel does
    from peft.tuners.lora import LoraLayer

    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(model, PeftModel):
        raise UpdateError(f"a base update is folded into the clients' PeftModel, got {type(model).__name__}")
    once = leave_out_copies(model, base_update)
    # By identity: PEFT may wrap more modules than the update has, which changes the names of their parameters.
    trained = {id(p): p.requires_grad for p in model.parameters()}
    active = model.active_adapter
    try:
        with torch.random.fork_rng():  # PEFT draws factors, which are then replaced
            model.add_adapter(_NAME, LoraConfig(**_with_wrappers(config, model)))
        _set_factors(model, once)
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and (_NAME in layer.lora_A or _NAME in layer.lora_embedding_A):
                layer.merge(adapter_names=[_NAME])
                layer.merged_adapters.remove(_NAME)
    finally:
        if _NAME in model.peft_config:
            model.delete_adapter(_NAME)
        model.set_adapter(active)
        for p in model.parameters():
            p.requires_grad_(trained.get(id(p), False))


def _with_wrappers(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The configuration of a base update, whose expressions for names fit a model with compiled layers too."""
    if not any("._orig_mod." in name for name, _ in model.named_modules()):
        return dict(config)

    def wrapped(pattern: str) -> str:
        return pattern.replace(r"\.", r"\.(?:_orig_mod\.)?")

    changed = {field: {wrapped(p): x for p, x in (config.get(field) or {}).items()} for field in _PATTERNS}
    targets = config.get("target_modules")
    return dict(config) | changed | {"target_modules": wrapped(targets) if isinstance(targets, str) else targets}


@torch.no_grad()
def _set_factors(model: Any, base_update: Mapping[str, Tensor]) -> None:
    """Copy the factors of a base update into the adapter that was added for them."""
    parameters = {without_wrappers(name): p for name, p in model.named_parameters()}
    for key, x in base_update.items():
        name = re.sub(r"(\.lora_(?:embedding_)?[AB])(\.weight)?$", rf"\1.{_NAME}\2", key)
        if name not in parameters or parameters[name].shape != x.shape:
            has = tuple(parameters[name].shape) if name in parameters else "no such module"
            raise UpdateError(
                f"the base update, {key} {tuple(x.shape)}: the model has {has}; fold it into the clients' model"
            )
        parameters[name].copy_(x)
