"""Clients of unequal ranks and scalings: the layout that holds them all, and s of ΔW = s·B·A as PEFT defines it."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .adapters import Layout
from .errors import UpdateError
from .keys import parse_factor
from .updates import Update

_PREFIX = "base_model.model."


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """α/r, or α/√r for rsLoRA, of one module.

    Args:
        config: the content of adapter_config.json.
        module: its name in a state dict.
        rank: r.
    """
    name = module.removeprefix(_PREFIX)
    # PEFT: a pattern is a regular expression for the end of the module's name, and the first that fits counts.
    found = (a for end, a in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({end})$", name))
    alpha = next(found, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def with_configs(clients: Sequence[Update], configs: Any) -> list[Update]:
    """The clients with the LoRA configurations that the caller gave for their state dicts.

    Args:
        clients: opened.
        configs: a ``peft.LoraConfig`` or the content of an adapter_config.json, for all clients or one each; or None.

    Raises:
        UpdateError: not one per client, or for a folder, which has its own.
    """
    if configs is None:
        return list(clients)
    one = isinstance(configs, Mapping) or hasattr(configs, "to_dict")
    given = [configs] * len(clients) if one else list(configs)
    if len(given) != len(clients):
        raise UpdateError(f"{len(given)} configs for {len(clients)} updates; pass one for all, or one per update")
    if folder := next((client.name for client in clients if client.config is not None), None):
        raise UpdateError(f"{folder} is a folder and has its configuration; configs are for state dicts")
    as_dicts = [config if isinstance(config, Mapping) else config.to_dict() for config in given]
    return [replace(client, config=dict(config)) for client, config in zip(clients, as_dicts, strict=True)]


def widest_layout(clients: Sequence[Update]) -> Layout:
    """The layout of clients that are alike but for their ranks, with the largest rank of each adapter.

    Raises:
        UpdateError: clients that differ in more, in keys, shapes or dtypes.
    """
    for client in clients:
        Layout(client.specs, client.name)  # refuses factors that do not fit each other
    ranks: dict[str, int] = {}
    for client in clients:
        for key, axis in _rank_axes(client):
            ranks[key] = max(ranks.get(key, 0), client.specs[key].shape[axis])
    widened = []
    for client in clients:
        specs = dict(client.specs)
        for key, axis in _rank_axes(client):
            shape = list(specs[key].shape)
            shape[axis] = ranks[key]
            specs[key] = replace(specs[key], shape=tuple(shape))
        widened.append(specs)
    layout = Layout(widened[0], clients[0].name)
    for client, specs in zip(clients[1:], widened[1:], strict=True):
        layout.check(specs, client.name, clients[0].name)
    return layout


def scalings(clients: Sequence[Update], layout: Layout) -> tuple[dict[str, float] | None, list[dict[str, float]] | None]:
    """module → s of the result, that of the first client of the largest rank, and module → s of every client.

    None and None if no client has a configuration.

    Raises:
        UpdateError: ranks differ and a client has no configuration, without which its B·A has no scale.
    """
    unequal = any(client.specs[key].shape != layout.specs[key].shape for client in clients for key in layout.specs)
    if lacking := next((client.name for client in clients if client.config is None), None):
        if unequal or any(client.config is not None for client in clients):
            raise UpdateError(
                f"{lacking} has no LoRA configuration, and ranks or scalings may differ; pass folders, or configs=[…]"
            )
        return None, None
    of_clients, of_result = [], dict[str, float]()
    for client in clients:
        assert client.config is not None
        ranks = {a.module: client.specs[a.key_A].shape[0] for a in layout.adapters}
        of_clients.append({module: scaling(client.config, module, r) for module, r in ranks.items()})
        of_result = {a.module: of_clients[-1][a.module] for a in layout.adapters if ranks[a.module] == a.rank} | of_result
    if any(s != of_result for s in of_clients) and (bias := next((k for k in layout.plain if ".lora_" in k), None)):
        raise UpdateError(f"{bias}: clients of unequal scaling cannot average this tensor; use one LoRA configuration")
    return of_result, of_clients


def result_config(clients: Sequence[Update], layout: Layout) -> dict[str, Any] | None:
    """The configuration of a result of the layout's ranks: a client's whose ranks they are, or one that spells them out."""
    if any(client.config is None for client in clients):
        return None
    for client in clients:
        if all(client.specs[a.key_A].shape[0] == a.rank for a in layout.adapters):
            return client.config
    s, _ = scalings(clients, layout)
    config = clients[0].config
    assert s is not None and config is not None
    ranks, alphas = {}, {}
    for a in layout.adapters:
        name = a.module.removeprefix(_PREFIX)
        ranks[name] = a.rank
        alphas[name] = s[a.module] * (math.sqrt(a.rank) if config.get("use_rslora") else a.rank)
    return {**config, "r": max(ranks.values()), "rank_pattern": ranks, "alpha_pattern": alphas}


def _rank_axes(client: Update) -> list[tuple[str, int]]:
    parsed = ((key, parse_factor(key)) for key in client.specs)
    return [(key, 0 if p.factor == "A" else 1) for key, p in parsed if p]
