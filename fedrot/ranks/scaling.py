"""The scalings s of ΔW = s·B·A of a round's clients and of its result."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..adapters.checks import own_scalings
from ..adapters.common import UnequalRanks, are_alike
from ..adapters.config import rank_fields, scaling, whole_name
from ..adapters.layout import Layout
from ..adapters.update import Update
from ..errors import UpdateError


@dataclass(frozen=True)
class Scalings:
    """The scalings of a round's clients and of its result.

    Attributes:
        config: the result's adapter_config.json.
        result: module → s under that configuration.
        per_client: per client module → s.
    """

    config: dict[str, Any]
    result: dict[str, float]
    per_client: list[dict[str, float]]


def round_scalings(
    clients: Sequence[Update], layout: Layout, reference: Update | None, unequal_ranks: UnequalRanks
) -> Scalings | None:
    """The scalings of a round's clients and of its result; None where they play no part.

    Args:
        clients: the clients, which have the layout but for their ranks.
        layout: the layout of the result.
        reference: the reference, whose configuration the result takes if clients are padded to its ranks.
        unequal_ranks: whether ranks and scalings may differ.

    Raises:
        UpdateError: a scaling that is needed and unknown, or tensors that unequal scalings forbid.
    """
    if unequal_ranks == "pad":
        return scalings_if_unlike(clients, layout, reference)
    s = scalings(clients, layout) if unequal_ranks == "stack" else None
    if s is not None:
        check_biases(layout, s)
    return s


def scalings(clients: Sequence[Update], layout: Layout, config: dict[str, Any] | None = None) -> Scalings | None:
    """The scalings of clients and of their result; None if no client has a configuration.

    Args:
        clients: the clients, which have the layout but for their ranks.
        layout: the layout of the result.
        config: the result's configuration, if that is settled. Otherwise the result takes that of the first client whose
            ranks are the layout's, or a configuration that spells ranks out.

    Raises:
        UpdateError: ranks differ and a client has no configuration, without which its B·A has no scale.
    """
    if lacking := next((client for client in clients if client.config is None), None):
        unequal = ((c, key) for c in clients for key in layout.specs if c.specs[key].shape != layout.specs[key].shape)
        if other := next(unequal, None):
            client, key = other
            raise UpdateError(
                f"{client.name}, {key}: shape {client.specs[key].shape}, but the result has {layout.specs[key].shape}, and "
                f"{lacking.name} has no LoRA configuration, without which a smaller rank has no scaling; pass folders, "
                "configs=[…], or (state dict, configuration)"
            )
        if any(client.config is not None for client in clients):
            raise UpdateError(
                f"{lacking.name} has no LoRA configuration, and ranks or scalings may differ; pass folders, or configs=[…]"
            )
        return None
    per_client = [own_scalings(client, layout) for client in clients]
    if config is None:
        widest = next((c for c in clients if all(c.specs[k].shape == spec.shape for k, spec in layout.specs.items())), None)
        config = dict((widest or clients[0]).config or {}) | ({} if widest else _spelt_out(clients, layout, per_client))
    result = {a.module: scaling(config, a.module, a.rank, "the result") for a in layout.adapters}
    return Scalings(config, result, per_client)


def config_of_ranks(scalings: Scalings, ranks: Mapping[str, int], tied: Mapping[str, str]) -> dict[str, Any]:
    """The result's configuration with other ranks, which keeps every module's scaling.

    Args:
        scalings: the scalings of the round.
        ranks: module → rank.
        tied: module of a copy → the module whose adapter it repeats.
    """
    config, s = scalings.config, scalings.result
    per_rank = {m: s[m] / math.sqrt(r) if config.get("use_rslora") else s[m] for m, r in ranks.items()}
    all_ranks = {**ranks, **{copy: ranks[module] for copy, module in tied.items()}}
    return config | rank_fields(all_ranks, per_rank | {copy: per_rank[module] for copy, module in tied.items()})


def check_biases(layout: Layout, scalings: Scalings) -> None:
    """Raise UpdateError if clients of unequal scalings have biases of lora_B, which would have to be scaled as B is."""
    if any(s != scalings.result for s in scalings.per_client) and (
        bias := next((k for k in layout.other_keys if k.endswith(".lora_B.bias")), None)
    ):
        raise UpdateError(f"{bias}: clients of unequal scaling cannot average this tensor; use one LoRA configuration")


def _spelt_out(clients: Sequence[Update], layout: Layout, per_client: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Fields that spell out the rank and α of every module, with the scaling of the first client of that rank."""
    rslora = bool((clients[0].config or {}).get("use_rslora"))
    ranks, alphas = {}, {}
    for a in layout.adapters:
        s = next(
            (s[a.module] for c, s in zip(clients, per_client, strict=True) if c.specs[a.key_A].shape[0] == a.rank), None
        )
        if s is None:
            raise UpdateError(
                f"the reference has no LoRA configuration, and no client its rank {a.rank} in {a.key_A}: its scaling is "
                "unknown; pass it as a folder, or as (state dict, configuration)"
            )
        tied = [copy for copy, module in clients[0].storage.tied_modules.items() if module == a.module]
        for name in map(whole_name, (a.module, *tied)):
            ranks[name], alphas[name] = a.rank, s * (math.sqrt(a.rank) if rslora else a.rank)
    return {"r": max(ranks.values()), "rank_pattern": ranks, "alpha_pattern": alphas}


def scalings_if_unlike(clients: Sequence[Update], layout: Layout, reference: Update | None) -> Scalings | None:
    """The scalings of clients that differ from the result in ranks or scaling; None if all have those of the result.

    Args:
        clients: the clients, which have the layout but for their ranks.
        layout: the layout of the result.
        reference: the reference, whose configuration the result takes if there is one.
    """
    config = reference.config if reference is not None else None
    others = [] if config is None else [replace(clients[0], config=config)]
    if clients[0].specs == layout.specs and are_alike([*clients, *others]):
        return None
    return scalings(clients, layout, config)
