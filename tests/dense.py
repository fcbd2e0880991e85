"""Adapters of PEFT in dense float64 arithmetic: what methods are compared with."""

import re
from dataclasses import replace

import torch
from peft import set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from .peft_models import KINDS, client_updates, factor_keys, peft_model

KIND = KINDS["float64"]
WEIGHTS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
SHARES = (WEIGHTS / WEIGHTS.sum()).tolist()
# Clients of one base whose ranks and scalings all differ, one of them by module.
UNEQUAL = [
    replace(KIND, config=KIND.config | config)
    for config in (
        {"r": 2, "lora_alpha": 8},
        {"r": 6, "lora_alpha": 3, "use_rslora": True},
        {"r": 3, "lora_alpha": 5, "rank_pattern": {"value": 5}, "alpha_pattern": {"value": 7}},
    )
]

WIDE = replace(KIND, config=KIND.config | {"r": 7, "lora_alpha": 6})


def lora_config(kind):
    return peft_model(kind).peft_config["default"]


def modules(kind, update):
    """module → (A, B, s) as PEFT has them, in its own layers."""
    model = peft_model(kind)
    set_peft_model_state_dict(model, update)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert layers
    return {n: (m.lora_A.default.weight, m.lora_B.default.weight, m.scaling["default"]) for n, m in layers.items()}


def dense(kind, update):
    """module → s·B·A."""
    return {name: (s * B @ A).detach().clone() for name, (A, B, s) in modules(kind, update).items()}


def mean_update(kinds, updates, shares=SHARES):
    """module → Σ pᵢsᵢBᵢAᵢ"""
    of_clients = [dense(kind, update) for kind, update in zip(kinds, updates, strict=True)]
    return {name: sum(p * d[name] for p, d in zip(shares, of_clients, strict=True)) for name in of_clients[0]}


def base_change(result):
    """module → what is added to the base weight."""
    pairs = factor_keys(result.base_update)
    return {re.sub(r"\.lora_A.*", "", a): result.base_update[b] @ result.base_update[a] for a, b in pairs}


def with_frozen(updates, factor):
    """All clients with the first one's A or B."""
    keys = [pair["AB".index(factor)] for pair in factor_keys(updates[0])]
    return [{**u, **{key: updates[0][key] for key in keys}} for u in updates]


def pairs(kinds, seed=0):
    """A client of each kind: its update with its configuration."""
    return [(client_updates(kind, 1, seed + i)[0], lora_config(kind)) for i, kind in enumerate(kinds)]


def matrices(update, keys):
    return [update[key].double().flatten(1) for key in keys]


def scaling_of(kinds, wide):
    """key of A → sᵢ/s of every client, from PEFT's own layers."""

    def of(key):
        name, s = key.split(".lora_")[0], []
        for kind in (*kinds, wide):
            layer = dict(peft_model(kind).named_modules())[name]
            s.append(layer.scaling["default"])
        return [x / s[-1] for x in s[:-1]]

    return of


def best(M, k):
    U, S, Vh = torch.linalg.svd(M)
    return U[:, :k] * S[:k] @ Vh[:k]
