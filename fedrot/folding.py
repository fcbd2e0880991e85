"""Adding to the base weights what a method leaves for them, as an adapter that PEFT merges."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .keys import parse_factor

if TYPE_CHECKING:
    from .aggregation import AggregationResult

_NAME = "fedrot_base_update"
# What the update is not, whatever the clients' adapters are: B·A alone, on the modules named, with s = 1.
_PLAIN: dict[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "bias": "none",
    "init_lora_weights": True,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "exclude_modules": None,
}


def base_config(base_update: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The adapter_config.json of a base update.

    Args:
        base_update: key → factor, under the keys of a saved adapter.
        config: of the clients' adapters, which knows the model and whether its weights are transposed.
    """
    ranks: dict[str, int] = {}
    for key, x in base_update.items():
        if (parsed := parse_factor(key)) and parsed.factor == "A":
            ranks[parsed.module.removeprefix("base_model.model.")] = x.shape[0]
    K = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != K}
    size = {"r": K, "lora_alpha": K, "rank_pattern": others, "alpha_pattern": others}
    return {"peft_type": "LORA", **(config or {}), **_PLAIN, **size, "target_modules": sorted(ranks)}


def fold(model: Any, result: "AggregationResult") -> None:
    """Add a result's ``base_update`` to the base weights of a PEFT model, in place. PEFT merges it, so that transposed
    weights (``fan_in_fan_out``), convolutions, embeddings and quantised layers are treated as it treats them.

    Args:
        model: a ``peft.PeftModel``; its own adapter stays as it is.
        result: of a method that changes the base weights; of another, nothing is done.
    """
    if result.base_update is None:
        return
    from peft import LoraConfig, set_peft_model_state_dict  # an aggregation needs no PEFT, a PeftModel does
    from peft.tuners.lora import LoraLayer

    trained = [p for p in model.parameters() if p.requires_grad]
    active = model.active_adapter
    model.add_adapter(_NAME, LoraConfig(**(result.base_config or {})))
    set_peft_model_state_dict(model, result.base_update, adapter_name=_NAME)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and (_NAME in layer.lora_A or _NAME in layer.lora_embedding_A):
            layer.merge(adapter_names=[_NAME])
            layer.merged_adapters.remove(_NAME)
    model.delete_adapter(_NAME)
    model.set_adapter(active)
    for p in trained:
        p.requires_grad_(True)
