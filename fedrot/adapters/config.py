"""One adapter_config.json: its ranks and scalings, and whether it describes an adapter that can be averaged."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from ..errors import UpdateError
from .patterns import look_up

CONFIG = "adapter_config.json"
# The values that fields have for PEFT where an adapter_config.json lacks them.
DEFAULTS = MappingProxyType({"r": 8, "lora_alpha": 8, "qalora_group_size": 16, "init_lora_weights": True})
# What PEFT puts before the names of modules in a state dict, and not in its patterns.
PREFIX = "base_model.model."
_EXPERT = re.compile(r"\[\d+\]$")
_PROJECTION = ".base_layer.out_proj"
# Virtual tokens have places: a mixture of two is another prompt, not the same one in another basis.
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
_REFUSED = {
    "use_bdlora": "block-diagonal factors",
    "kasa_config": "KaSA puts a diagonal between B and A",
    "monteclora_config": "MonteCLoRA samples between B and A",
}
# Fields that a base update has in common with the clients' adapters: the model, and whether its weights are transposed. Not
# the task: by SEQ_CLS and others PEFT looks for a saved classifier, which is in the adapter, not in the base update.
_OF_THE_MODEL = ("base_model_name_or_path", "fan_in_fan_out")


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration as adapter_config.json has it: lists for sets, strings for enumerations.

    Args:
        config: a ``peft.LoraConfig``, or a mapping of its fields.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    text = json.dumps(dict(values), default=lambda x: sorted(x) if isinstance(x, set | frozenset) else str(x))
    plain: dict[str, Any] = json.loads(text)
    return plain


def check_lora(config: Any, name: str) -> None:
    """Raise UpdateError unless the configuration is of a LoRA adapter that can be rotated."""
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if peft_type != "LORA":
        instead = ": average the prompt_embeddings as they are" if peft_type in _PROMPTS else ""
        raise UpdateError(f"{name} describes peft_type {peft_type!r}; only LORA adapters have frames to align{instead}")
    for field, why in _REFUSED.items():
        if config.get(field):
            raise UpdateError(f"{name} sets {field} ({why}), which cannot be rotated")


def scaling(config: Mapping[str, Any], module: str, rank: int, client: str) -> float:
    """The scaling s of one module: α/r, or α/√r for rsLoRA.

    Args:
        config: the content of adapter_config.json.
        module: the module's name in a state dict.
        rank: r.
        client: the client's name in errors.

    Raises:
        UpdateError: an α that is not a positive number, or a pattern that is no safe regular expression.
    """
    alpha = _value(config, "alpha_pattern", "lora_alpha", module, client)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise UpdateError(
            f"{client}, {module}: lora_alpha is {alpha!r} in its LoRA configuration; expected a positive number, the one "
            "that the adapter was trained with"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def rank_of(config: Mapping[str, Any], module: str, client: str) -> int:
    """The rank r of one module under a configuration.

    Args:
        config, module, client: as for ``scaling``.

    Raises:
        UpdateError: an r that is not a positive whole number, or a pattern that is no safe regular expression.
    """
    r = _value(config, "rank_pattern", "r", module, client)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise UpdateError(
            f"{client}, {module}: r is {r!r} in its LoRA configuration; expected a positive whole number, the rank that the "
            "adapter was trained with"
        )
    return r


def _value(config: Mapping[str, Any], field: str, otherwise: str, module: str, client: str) -> Any:
    """The value of the first pattern in ``field`` that fits the module, or else that of the field ``otherwise``."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise UpdateError(f"{client}: {field} is {patterns!r}; expected a mapping of modules to numbers")
    try:
        found = look_up(patterns, pattern_name(module)) if patterns else None
    except re.error as error:
        raise UpdateError(
            f"{client}: {field} has {str(error.pattern)[:80]!r} ({error.msg}); name modules plainly"
        ) from error
    return config.get(otherwise, DEFAULTS[otherwise]) if found is None else found[1]


def pattern_name(module: str) -> str:
    """The name by which PEFT's patterns know a module.

    The projection of a MultiheadAttention stands in a layer that PEFT wraps whole, and takes that layer's rank and α. An
    expert has no name of its own: a pattern fits the parameter that all experts share.
    """
    name = module.removeprefix(PREFIX)
    return _EXPERT.sub("", name).removesuffix(_PROJECTION)


def whole_name(module: str) -> str:
    """A pattern that fits this module, and no other whose name has the same end."""
    return "^" + re.escape(pattern_name(module))


def base_config(ranks: Mapping[str, int], parameters: Collection[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter_config.json of a base update: plain LoRA on its modules, with s = 1.

    Args:
        ranks: module, or parameter with its module → rank.
        parameters: which of them are parameters.
        config: the configuration of the clients' adapters.
    """
    K = max(ranks.values())
    others = {whole_name(module): rank for module, rank in ranks.items() if rank != K}
    modules = sorted({re.escape(pattern_name(module)) for module in ranks if module not in parameters})
    base = {
        "peft_type": "LORA",
        **{field: config[field] for field in _OF_THE_MODEL if field in config},
        "r": K,
        "lora_alpha": K,
        "rank_pattern": others,
        "alpha_pattern": others,
        # One regular expression for whole names: a list would fit modules whose names end alike.
        "target_modules": "|".join(modules) if modules else [],
    }
    # PEFT wants the same words for the parameters in every adapter of a model.
    return base | ({"target_parameters": config["target_parameters"]} if parameters else {})


def rank_fields(ranks: Mapping[str, int], s: Mapping[str, float]) -> dict[str, Any]:
    """The fields r and lora_alpha for most modules, and patterns for the others.

    Args:
        ranks: module → rank.
        s: module → scaling.
    """
    alphas = {module: _number(s[module] * r) for module, r in ranks.items()}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {whole_name(m): x for m, x in ranks.items() if x != r},
        "alpha_pattern": {whole_name(m): x for m, x in alphas.items() if x != alpha},
    }


def _number(x: float) -> float:
    """The number s·r without its rounding: it is a whole number in most configurations."""
    return round(x) if abs(x - round(x)) <= 1e-12 * abs(x) else x
