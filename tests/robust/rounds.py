"""Rounds with attackers, clients in bases of their own, and the definitions of rules in dense float64 arithmetic."""

import torch

from ..dense import KIND, lora_config
from ..peft_models import client_updates, factor_keys

HEAD = "base_model.model.classifier.weight"


def honest(n, spread=0.3, seed=0, kind=KIND):
    """Clients near one update."""
    common, *clients = client_updates(kind, n + 1, seed)
    return [{key: common[key] + spread * x for key, x in client.items()} for client in clients]


def attacked(n, f, scale=-3.0, seed=0):
    """n clients, the last f of which send a multiple of their B."""
    clients = honest(n, seed=seed)
    for client in clients[n - f :]:
        for _, b in factor_keys(client):
            client[b] = client[b] * scale
    return clients


def turned(clients, seed=1, condition=30.0):
    """The same updates, every client in bases of its own: rotated, reflected and rescaled by invertible matrices."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for client in clients:
        client = dict(client)
        for a, b in factor_keys(client):
            r = client[a].shape[0]
            U, V = (torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q for _ in range(2))
            G = U * condition ** (torch.rand(r, generator=generator) - 0.5) @ V
            client[a], client[b] = torch.linalg.solve(G, client[a].double()), client[b].double() @ G
            client[a], client[b] = (client[key].to(clients[0][key].dtype) for key in (a, b))
        found.append(client)
    return found


def vectors(clients, kind=KIND, *, heads=True):
    """Every client's updates s·B·A and, if asked for, its other tensors side by side, (N, …)."""
    s, factors = (
        lora_config(kind).lora_alpha / lora_config(kind).r,
        {key for pair in factor_keys(clients[0]) for key in pair},
    )
    own = [[(s * c[b].double() @ c[a].double()).flatten() for a, b in factor_keys(c)] for c in clients]
    others = [[x.double().flatten() for key, x in c.items() if heads and key not in factors] for c in clients]
    return torch.stack([torch.cat([*x, *y]) for x, y in zip(own, others, strict=True)])


def pairs(clients, kind=KIND):
    """The clients with their LoRA configuration."""
    return [(client, lora_config(kind)) for client in clients]
