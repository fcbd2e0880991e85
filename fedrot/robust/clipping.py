"""Norm clipping: a client's change is shortened to a bound, exactly, whatever the method makes of the mean update.

Let W₀ be the reference's update, ΔWᵢ = W₀ + Cᵢ that of a client whose change Cᵢ is too long, and c < 1 the bound over ‖Cᵢ‖.
The clipped client W₀ + c Cᵢ is c ΔWᵢ + (1 − c) W₀. In a mean of clients it is therefore the same client with c
times its weight, and the reference with the rest of it. Without a reference W₀ is zero, and c multiplies the client's B.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters.checks import own_scalings
from ..adapters.storage import Storage
from ..adapters.update import Update
from ..errors import UpdateError
from ..options import Clip
from ..ranks.prepare import PreparedRound

START = "the reference"


def clip_factors(changes: Tensor, clip: Clip, names: Sequence[str]) -> tuple[float, Tensor]:
    """Find the bound, and what is left of every client's change.

    Args:
        changes: (N,), the norms.
        clip: the bound, or "median" for the lower median of the norms.
        names: the clients' names, for the error.

    Returns:
        The bound and (N,) factors, at most 1.

    Raises:
        UpdateError: the median is zero, and some norm is not.
    """
    bound = float(changes.median()) if clip == "median" else float(clip or 0)
    if bound == 0 and bool((changes > 0).any()):
        moved = [name for name, change in zip(names, changes.tolist(), strict=True) if change > 0]
        raise UpdateError(
            f"clip='median' is 0, because {len(names) - len(moved)} of {len(names)} clients changed nothing, and would "
            f"leave nothing of {', '.join(moved)}; pass a positive number"
        )
    return bound, torch.where(changes > bound, bound / changes, 1.0)


def clip_clients(round: PreparedRound, left: Sequence[float]) -> tuple[PreparedRound, float]:
    """Shorten the changes of a round's clients.

    Args:
        round: the round, whose weights sum to 1.
        left: one per client, what is left of its change.

    Returns:
        The round, and the share of the reference in its mean, which is its last client where that is positive.
    """
    if all(c == 1 for c in left):
        return round, 0.0
    if round.reference is None:
        return replace(
            round, clients=[_shortened(client, c, round) for client, c in zip(round.clients, left, strict=True)]
        ), 0.0
    weights = [w * c for w, c in zip(round.weights, left, strict=True)]
    rest = sum(w * (1 - c) for w, c in zip(round.weights, left, strict=True))
    start = _as_client(round.reference, round)
    s = round.scalings
    if s is not None:
        known = round.unequal_ranks == "stack" and round.reference.config is not None
        s = replace(s, per_client=[*s.per_client, own_scalings(round.reference, round.layout) if known else s.result])
    given, clients = [*round.given, start], [*round.clients, start]
    positions = {**round.positions, START: len(round.positions)}
    return replace(round, given=given, clients=clients, positions=positions, weights=[*weights, rest], scalings=s), rest


def _as_client(reference: Update, round: PreparedRound) -> Update:
    """The reference in the clients' dtypes, as one of them."""
    first, layout = round.given[0], round.layout
    tensors, factors = {}, {key for keys in layout.factor_keys for key in keys}
    for key, spec in layout.specs.items():
        if key in layout.counters:
            tensors[key] = first[key]
            continue
        x = reference[key].to(first.device, spec.dtype)
        if x.numel() > math.prod(spec.shape):
            raise UpdateError(
                f"{reference.name}, {key}: shape {tuple(x.shape)}, but clients have at most {spec.shape}, so that it cannot "
                "stand for what clip= takes from them; pass the adapter that the clients started from"
            )
        tensors[key] = x if key in factors and x.numel() < math.prod(spec.shape) else x.reshape(spec.shape)
    keys = {key: key for key in tensors}
    specs = {key: replace(layout.specs[key], shape=tuple(x.shape)) for key, x in tensors.items()}
    return Update(START, specs, keys, tensors, first.device, first.config, None, Storage(keys))


def _shortened(client: Update, factor: float, round: PreparedRound) -> Update:
    """A client whose B is multiplied by a factor."""
    if factor == 1:
        return client
    B = {a.key_B for a in round.layout.adapters}
    tensors = {key: client[key].detach() * factor if key in B else client[key] for key in client}
    keys = {key: key for key in tensors}
    return replace(client, keys_given=keys, tensors=tensors, storage=Storage(keys))
