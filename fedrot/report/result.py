"""What an aggregation returns."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .report import Report


@dataclass(frozen=True)
class AggregationResult:
    """The aggregated adapter.

    Attributes:
        state_dict: the keys, shapes and dtypes of the first update; shapes of the largest ranks, where ranks differ.
            Without base weights that PEFT saved beside an adapter (embeddings), where ``base_update`` changes them.
        report: aggregation error and rotation angles per adapter, clients used and dropped.
        config: its adapter_config.json, from the reference's or else the clients' folders or configs; None without any.
        base_update: of methods that change the base weights (FLoRA, FedEx-LoRA) the change, as the PEFT state dict of an
            adapter to be merged into the base before ``state_dict`` is used, under the keys of a saved one: see
            ``fedrot.fold``. None of other methods.
        base_config: the adapter_config.json of that adapter.
        personal: keys that are not in ``state_dict``, of which each client keeps its own (B of FedSA-LoRA).
    """

    state_dict: dict[str, Tensor] = field(repr=False)
    report: Report
    config: dict[str, Any] | None = None
    base_update: dict[str, Tensor] | None = field(default=None, repr=False)
    base_config: dict[str, Any] | None = None
    personal: tuple[str, ...] = ()
