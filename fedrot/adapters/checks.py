"""Refusing what cannot be aggregated: updates, references, weights and results, by client, key and shapes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UpdateError
from .config import check_scaling
from .keys import TensorSpec
from .layout import Layout
from .update import StateDict, Update, UpdateLike, open_update


def check_updates(clients: Sequence[Update]) -> Layout:
    """The layout of clients; raise UpdateError unless all have it and one scaling."""
    first = clients[0]
    layout = Layout(first.specs, first.name)
    for other in clients[1:]:
        check_update(other, first, layout)
    return layout


def check_update(update: Update, first: Update, layout: Layout) -> None:
    """Raise UpdateError unless the update has the layout and the scaling of ``first``."""
    if update.specs is not first.specs:
        layout.check(update.specs, update.name, first.name)
    check_device(update, first)
    check_scaling(update.config, update.name, first.config, first.name)


def check_device(update: Update, first: Update) -> None:
    """Raise UpdateError unless both are on one device."""
    if update.device != first.device:
        raise UpdateError(
            f"{update.name} is on {update.device}, but {first.name} on {first.device}; move them to one device"
        )


def open_reference(reference: UpdateLike, first: Update, layout: Layout) -> Update:
    """The reference as an Update with the adapters of the layout, all finite."""
    opened = open_update(reference, "the reference", first)
    return check_reference(opened, first, layout, finite=opened is reference)


def check_reference(opened: Update, first: Update, layout: Layout, *, finite: bool) -> Update:
    """A reference that was opened, checked, and moved to the clients' device; ``finite``: it is known to be."""
    if opened.specs is not first.specs:
        layout.check_reference(opened.specs, opened.name, first.name)
    check_scaling(opened.config, opened.name, first.config, first.name)
    factors = [key for a in layout.adapters for key in (a.key_A, a.key_B)]
    if not finite and (found := not_finite(opened, factors)):  # a client is looked at as one
        raise UpdateError(f"{opened.name}, {found}; pass the adapter that the clients started from")
    if opened.device != first.device:
        moved = {given: opened[key].to(first.device) for key, given in opened.keys_given.items()}
        opened = replace(opened, tensors=moved, device=first.device)
    return opened


def check_weights(weights: Sequence[float] | None, clients: Sequence[Update]) -> list[float]:
    """One weight per client, non-negative and finite, not all zero; equal weights for None."""
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
    """The weight as a float; raise UpdateError unless it is finite and non-negative."""
    try:
        value = float(weight)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UpdateError(f"{client.name} has weight {weight}; weights are non-negative numbers, such as example counts")
    return value


def not_finite(update: Update, keys: Sequence[str] | None = None) -> str | None:
    """«key shape holds NaN or Inf» for the first such tensor, or None. One synchronisation with a device."""
    keys = list(update) if keys is None else keys
    if is_finite([update[key] for key in keys]):
        return None
    key = next(key for key in keys if not is_finite([update[key]]))
    return f"{key} {update.specs[key].shape} holds NaN or Inf"


@torch.no_grad()
def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one device hold no NaN and no Inf. One synchronisation with a device."""
    # Extremes take a tenth of the time of isfinite, and NaN is one.
    extremes = [x for tensor in tensors if tensor.numel() for x in torch.aminmax(tensor)]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def as_sent(x: Tensor, spec: TensorSpec) -> Tensor:
    """A copy of a factor that was not trained, as the clients' updates have it."""
    return x.detach().to(spec.dtype, copy=True).reshape(spec.shape)


def check_frozen(client: Update, expected: StateDict, frozen: Iterable[str], method: str) -> None:
    """Raise UpdateError if a factor that clients do not train is not what it was."""
    for key in frozen:
        x, y = client[key].detach(), expected[key].detach()
        if not torch.equal(x, y.to(x.device, x.dtype).reshape(x.shape)):
            raise UpdateError(
                f"{client.name}, {key} {tuple(x.shape)}: frozen in this round of {method}, but not what clients started "
                "from; begin from one adapter and do not train it, or pass the right round"
            )


def check_range(state_dict: StateDict, name: str) -> None:
    """Raise UpdateError if a result overflowed its dtype."""
    if is_finite(list(state_dict.values())):
        return
    for key, x in state_dict.items():
        if not bool(x.isfinite().all()):
            raise UpdateError(f"{name} {key} {tuple(x.shape)} overflows {x.dtype}; send updates in a wider dtype")
