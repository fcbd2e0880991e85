"""What factors mean: the fields of a LoRA configuration that two adapters must have alike to be averaged."""

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from types import MappingProxyType
from typing import Any

from ..errors import UpdateError
from .config import CONFIG, DEFAULTS

Config = Mapping[str, Any]

# Initialisations that leave the base weights as they are. After any other, s·B·A is the difference to another base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# PiSSA by a randomised SVD draws other base weights at every load.
_RANDOM_START = "pissa_niter_"
_LONGEST = 120  # characters of a field's value in a digest, and in an error


def start_of(config: Config) -> str | None:
    """The initialisation that changed the base weights, such as "pissa", or None if they are as they were."""
    start = config.get("init_lora_weights", DEFAULTS["init_lora_weights"])
    start = start.lower() if isinstance(start, str) else start
    return None if start in _PLAIN_STARTS else str(start)


def _tokens(config: Config) -> Any:
    """The rows that are trained. One list is what PEFT makes a mapping of one entry of; keys name its module."""
    value = config.get("trainable_token_indices") or None
    return next(iter(value.values())) if isinstance(value, Mapping) and len(value) == 1 else value


def _start(config: Config) -> Any:
    """The start, with what a base that it changed depends on."""
    start = start_of(config)
    return (
        None if start is None else [start, _given(config, "r"), _given(config, "rank_pattern"), config.get("loftq_config")]
    )


def _given(config: Config, field: str) -> Any:
    return config.get(field, DEFAULTS.get(field)) or None


# field → what it amounts to, where values that differ may mean the same
_FIELDS: Mapping[str, Callable[[Config], Any]] = MappingProxyType(
    {
        "use_dora": lambda config: bool(config.get("use_dora")),
        "lora_bias": lambda config: bool(config.get("lora_bias")),
        "fan_in_fan_out": lambda config: bool(config.get("fan_in_fan_out")),
        "use_qalora": lambda config: bool(config.get("use_qalora")) and _given(config, "qalora_group_size"),
        "layer_replication": lambda config: _given(config, "layer_replication"),
        "trainable_token_indices": _tokens,
        "alora_invocation_tokens": lambda config: _given(config, "alora_invocation_tokens"),
        "init_lora_weights": _start,
    }
)
SCALING_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_WHY = MappingProxyType(
    {
        "trainable_token_indices": "the rows that they train are of other tokens",
        "init_lora_weights": "their updates are differences to unlike base weights",
        "layer_replication": "layers of one name are not the same layers",
        "alora_invocation_tokens": "they act on other tokens",
    }
)


def check_start(config: Config, name: str) -> None:
    """Raise UpdateError if a configuration's base weights are drawn at random at every load."""
    start = start_of(config)
    if start is not None and start.startswith(_RANDOM_START):
        raise UpdateError(
            f"{name}: init_lora_weights {start!r} draws other base weights at every load, so that no two clients have the "
            "same; train with init_lora_weights='pissa', or convert the adapter to a plain one (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )


def check_meaning(config: Config | None, name: str, other: Config | None, other_name: str) -> None:
    """Raise UpdateError unless factors mean the same under both configurations, but for their ranks and scalings.

    Args:
        config, other: the configurations; None if one is unknown, and then nothing is compared.
        name, other_name: the clients' names in errors.
    """
    if config is None or other is None or config is other:
        return
    for field, amounts_to in _FIELDS.items():
        if amounts_to(config) != amounts_to(other):
            mine, theirs = (_short(c.get(field, DEFAULTS.get(field))) for c in (config, other))
            if mine == theirs:  # a start of other ranks
                mine, theirs = (f"{mine} at r = {_short(c.get('r', DEFAULTS['r']))}" for c in (config, other))
            why = _WHY.get(field, "the same factors would mean other updates")
            raise UpdateError(
                f"{name} has {field} = {mine} in its {CONFIG}, but {other_name} has {theirs}; {why}: all must use one LoRA "
                "configuration"
            )


def scaling_fields(config: Config) -> tuple[Any, ...]:
    """The fields that scale B·A. Where they are equal, so are the scalings of all modules."""
    return tuple(_given(config, field) for field in SCALING_FIELDS)


def digest(config: Config) -> dict[str, str]:
    """What a configuration makes factors mean, ranks and scalings included, as short texts that can be sent and compared."""
    values = {field: amounts_to(config) for field, amounts_to in _FIELDS.items()}
    values |= {field: _given(config, field) for field in SCALING_FIELDS}
    texts = {field: json.dumps(_plain(value), sort_keys=True, ensure_ascii=False) for field, value in values.items()}
    return {field: _shorten(text) for field, text in texts.items()}


def _plain(value: Any) -> Any:
    """The value with whole numbers for floats that are whole, which JSON would write in another way."""
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"sha256:{sha256(text.encode()).hexdigest()}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
