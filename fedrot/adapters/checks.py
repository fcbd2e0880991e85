"""Refusing what cannot be aggregated: updates, references, weights and results, by client, key and shapes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UpdateError
from .config import CONFIG, scaling
from .keys import TensorSpec
from .layout import Layout
from .meaning import SCALING_FIELDS, check_meaning, scaling_fields
from .update import StateDict, Update, UpdateLike, open_update
from .values import not_finite


def check_updates(clients: Sequence[Update]) -> Layout:
    """The layout that all clients have; UpdateError unless they have one layout and one scaling."""
    first = clients[0]
    layout = Layout.of(first.specs, first.name)
    for other in clients[1:]:
        check_update(other, first, layout)
    return layout


def check_update(update: Update, first: Update, layout: Layout) -> None:
    """Raise UpdateError unless the update has the layout and the scaling of ``first``."""
    if update.specs is not first.specs:
        layout.check(update.specs, update.name, first.name)
    check_kind(update, first)
    check_scalings(update, first, layout)


def check_kind(update: Update, first: Update) -> None:
    """Raise UpdateError unless both are on one device and their factors mean the same, but for ranks and scalings."""
    check_device(update, first)
    check_meaning(update.config, update.name, first.config, first.name)


def check_scalings(update: Update, first: Update, layout: Layout) -> None:
    """Raise UpdateError unless two updates of one layout have one scaling, as far as their configurations are known."""
    if update.config is None or first.config is None or scaling_fields(update.config) == scaling_fields(first.config):
        return
    mine, theirs = (own_scalings(client, layout) for client in (update, first))
    if module := next((module for module, s in mine.items() if s != theirs.get(module, s)), None):
        told, other = (
            ", ".join(
                f"{field} = {config.get(field)!r}"[:80]
                for field in SCALING_FIELDS
                if update.config.get(field) != first.config.get(field)
            )
            for config in (update.config, first.config)
        )
        raise UpdateError(
            f"{update.name} has {told} in its {CONFIG}, but {first.name} has {other}, so that s is {mine[module]:g} and "
            f"{theirs[module]:g} in {module}; all clients must use one LoRA configuration"
        )


def check_device(update: Update, first: Update) -> None:
    """Raise UpdateError unless both updates are on one device."""
    if update.device != first.device:
        raise UpdateError(
            f"{update.name} is on {update.device}, but {first.name} on {first.device}; move them to one device"
        )


def own_scalings(client: Update, layout: Layout) -> dict[str, float]:
    """The scalings s of the layout's modules that a client has, module → s, from the client's configuration and ranks.

    Raises:
        UpdateError: an α that is not a positive number.
    """
    mine = [a for a in layout.adapters if a.key_A in client.specs]
    config = client.config or {}
    return {a.module: scaling(config, a.module, client.specs[a.key_A].shape[0], client.name) for a in mine}


def open_reference(reference: UpdateLike, first: Update, layout: Layout) -> Update:
    """Open a reference that must have the adapters of the layout, all finite.

    Args:
        reference: what the caller passed.
        first: the first client, on whose device the reference ends.
        layout: the layout of the clients.

    Raises:
        UpdateError: another adapter, or NaN or Inf in a factor.
    """
    opened = open_update(reference, "the reference", first)
    return check_reference(opened, first, layout, finite=opened is reference)


def check_reference(opened: Update, first: Update, layout: Layout, *, finite: bool) -> Update:
    """Check a reference that was opened, and move it to the clients' device.

    Args:
        opened: the reference.
        first: the first client.
        layout: the layout of the clients.
        finite: whether the reference is known to be finite.

    Raises:
        UpdateError: another adapter, or NaN or Inf in a factor.
    """
    if opened.specs is not first.specs:
        layout.check_reference(opened.specs, opened.name, first.name)
    check_meaning(opened.config, opened.name, first.config, first.name)
    check_scalings(opened, first, layout)
    factors = [key for a in layout.adapters for key in (a.key_A, a.key_B)]
    if not finite and (found := not_finite(opened, factors)):
        raise UpdateError(f"{opened.name}, {found}; pass the adapter that the clients started from")
    if opened.device != first.device:
        moved = {inner: opened[key].to(first.device) for key, inner in opened.keys_given.items()}
        opened = replace(opened, tensors=moved, device=first.device)
    return opened


def as_sent(x: Tensor, spec: TensorSpec) -> Tensor:
    """A copy of a factor that was not trained, in the shape and dtype that the clients' updates have."""
    return x.detach().to(spec.dtype, copy=True).reshape(spec.shape)


def carry(counters: dict[str, Tensor], client: Update, layout: Layout) -> dict[str, Tensor]:
    """The integers of several clients with those of one more: a number counts as large as the largest.

    Args:
        counters: key → tensor, of the clients before; empty for the first.
        client: the next client.
        layout: the layout of the clients.

    Raises:
        UpdateError: integers of another kind, such as indices, that differ.
    """
    carried = {}
    for key in layout.counters:
        x = client[key].detach().to(client.device, copy=True)
        known = counters.get(key, x)
        if x.numel() == 1:
            x = torch.maximum(known, x)
        elif not torch.equal(known, x):
            raise UpdateError(
                f"{client.name}, {key} {tuple(x.shape)}: integers ({x.dtype}) that differ from another client's; they "
                "cannot be averaged, leave the module out of modules_to_save or register them as no part of the state"
            )
        carried[key] = x
    return carried


def check_frozen(client: Update, expected: StateDict, frozen: Iterable[str], method: str) -> None:
    """Raise UpdateError if a client has changed a factor that clients do not train.

    Args:
        client: the client's update.
        expected: canonical key → the factor that clients started from.
        frozen: the keys of the factors that clients do not train.
        method: the method's name in errors.
    """
    for key in frozen:
        x, y = client[key].detach(), expected[key].detach()
        if not torch.equal(x, y.to(x.device, x.dtype).reshape(x.shape)):
            raise UpdateError(
                f"{client.name}, {key} {tuple(x.shape)}: frozen in this round of {method}, but not what clients started "
                "from; begin from one adapter and do not train it, or pass the right round"
            )
