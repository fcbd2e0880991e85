"""Refusing values: NaN and Inf, results that overflow, and weights that do not weigh."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedrot_kernels.checks import all_finite

from ..errors import UpdateError
from ..options import OnInvalid
from .update import StateDict, Update


def check_weights(weights: Sequence[float] | None, clients: Sequence[Update]) -> list[float]:
    """The weights as floats, one per client; UpdateError unless they are non-negative and finite, and not all zero.

    Args:
        weights: what the caller passed; None gives equal weights.
        clients: the clients.
    """
    if weights is None:
        return [1.0] * len(clients)
    if not isinstance(weights, Iterable):
        raise UpdateError(f"weights must be a sequence of numbers, one per update, got {weights!r}")
    given = list(weights)
    if len(given) != len(clients):
        raise UpdateError(f"{len(given)} weights for {len(clients)} updates; pass one weight per update")
    values = [check_weight(weight, client) for client, weight in zip(clients, given, strict=True)]
    if not any(values):
        raise UpdateError("all weights are zero; at least one client must count")
    return values


def check_weight(weight: float, client: Update) -> float:
    """The weight as a float; UpdateError unless it is finite and non-negative."""
    try:
        value = float(weight)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UpdateError(f"{client.name} has weight {weight}; weights are non-negative numbers, such as example counts")
    return value


def valid_clients(
    clients: Sequence[Update], weights: Sequence[float], on_invalid: OnInvalid, dropped: dict[str, str]
) -> tuple[list[Update], list[float]]:
    """The clients without NaN and Inf, and their weights; the others are added to ``dropped``.

    Raises:
        UpdateError: there is one, with ``on_invalid="raise"``, or none of positive weight is left.
    """
    kept = [(client, w) for client, w in zip(clients, weights, strict=True) if is_valid(client, on_invalid, dropped)]
    if not any(w for _, w in kept):
        raise nothing_left(dropped)
    return [client for client, _ in kept], [w for _, w in kept]


def is_valid(client: Update, on_invalid: OnInvalid, dropped: dict[str, str]) -> bool:
    """Whether a client has neither NaN nor Inf; see ``valid_clients``."""
    found = not_finite(client)
    if found and on_invalid == "raise":
        raise UpdateError(f'{client.name}, {found}; leave this client out, or drop such clients (on_invalid="drop")')
    if found:
        dropped[client.name] = found
    return not found


def nothing_left(dropped: dict[str, str]) -> UpdateError:
    """The error of a round without a client that counts."""
    reasons = "".join(f"; dropped {client}: {why}" for client, why in dropped.items())
    return UpdateError(f"nothing to average: no client of positive weight is left{reasons}")


def not_finite(update: Update, keys: Sequence[str] | None = None) -> str | None:
    """The words «key shape holds NaN or Inf» for the first such tensor, or None. One synchronisation with a device."""
    if (table := update.table) is not None and table.describe(1)[1] and table.is_finite():
        return None
    keys = list(update) if keys is None else keys
    if is_finite([update[key] for key in keys]):
        return None
    key = next(key for key in keys if not is_finite([update[key]]))
    return f"{key} {update.specs[key].shape} holds NaN or Inf"


@torch.no_grad()
def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one device hold no NaN and no Inf. One synchronisation with a device."""
    floats = [x for x in tensors if x.is_floating_point()]
    return not floats or bool(all_finite(floats))


def check_range(state_dict: StateDict, name: str) -> None:
    """Raise UpdateError if a result overflowed its dtype; ``name`` stands before the key."""
    if is_finite(list(state_dict.values())):
        return
    for key, x in state_dict.items():
        if not bool(x.isfinite().all()):
            raise UpdateError(f"{name} {key} {tuple(x.shape)} overflows {x.dtype}; send updates in a wider dtype")
