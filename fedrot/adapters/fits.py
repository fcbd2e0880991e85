"""Whether a LoRA configuration is that of the tensors that it came with."""

from collections.abc import Mapping
from typing import Any

from ..errors import UpdateError
from .config import DEFAULTS, rank_of, scaling
from .keys import TensorSpec, parse_factor
from .meaning import check_start


def check_config(config: Mapping[str, Any], specs: Mapping[str, TensorSpec], client: str) -> None:
    """Check a configuration against an adapter's tensors.

    Args:
        config: the content of adapter_config.json.
        specs: canonical key → spec.
        client: the client's name in errors.

    Raises:
        UpdateError: tensors of other ranks than the configuration has, an r or α that is not a positive number, or base
            weights that are drawn at random.
    """
    check_start(config, client)
    for key, spec in specs.items():
        if (parsed := parse_factor(key)) is None or parsed.factor != "A":
            continue
        told = rank_of(config, parsed.module, client)
        if spec.shape and spec.shape[0] != told:
            default = "" if "r" in config else f" (PEFT's default, r = {DEFAULTS['r']}, because it has no r)"
            raise UpdateError(
                f"{client}, {key}: shape {spec.shape}, but its LoRA configuration says rank {told}{default}; pass the "
                "configuration that it was trained with. If it is, sharded parameters were saved without being gathered"
            )
        scaling(config, parsed.module, told, client)
