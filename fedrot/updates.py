"""Opening what callers pass (state dicts or PEFT folders, with weights) and refusing what cannot be aggregated."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .adapters import Layout
from .errors import UpdateError
from .folders import AdapterFolder, check_lora, check_scaling, plain_config
from .keys import TensorSpec, describe

StateDict = Mapping[str, Tensor]
UpdateLike = StateDict | str | os.PathLike | tuple[StateDict, Any]


@dataclass(frozen=True)
class Update(Mapping[str, Tensor]):
    """One client's tensors under canonical keys; those of a folder are read when asked for.

    Attributes:
        name: how errors and reports call the client.
        specs: canonical key → shape and dtype.
        keys_given: canonical key → the caller's key.
        tensors: the caller's state dict, or the folder.
        device: where all tensors are.
        config: the folder's adapter_config.json, or what the caller gave in its place, or None.
        ranks: key of A → rank, where the client's tensors were padded with zeros to others' ranks; else None.
    """

    name: str
    specs: dict[str, TensorSpec]
    keys_given: dict[str, str]
    tensors: StateDict
    device: torch.device
    config: dict[str, Any] | None = None
    ranks: dict[str, int] | None = None

    @cached_property
    def looks(self) -> tuple[list, ...]:
        """Of the caller's state dict, what another must have alike to be opened without parsing its keys."""
        return _looks(self.tensors)

    def without_tensors(self) -> "Update":
        """What later updates are checked against, without keeping this one's memory."""
        kept = replace(self, tensors={})
        if type(self.tensors) is dict:
            kept.__dict__["looks"] = self.looks
        return kept

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[self.keys_given[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def open_update(update: UpdateLike, name: str, first: Update | None = None) -> Update:
    """A state dict or PEFT folder as an Update. Reads no tensor of a folder yet.

    Args:
        update: the state dict or folder, or a pair of a state dict and its LoRA configuration.
        name: how errors call the client.
        first: a client opened before. What looks just like it is opened without parsing a key.
    """
    if isinstance(update, Update):
        return update
    if (
        first is not None
        and type(update) is type(first.tensors) is dict
        and (looks := _looks(update))
        and looks == first.looks
    ):
        return replace(first, name=name, tensors=update, config=None)
    if isinstance(update, tuple) and len(update) == 2 and (isinstance(update[1], Mapping) or hasattr(update[1], "to_dict")):
        state_dict, config = update[0], plain_config(update[1])
        check_lora(config, f"{name}: its configuration")
        return replace(open_update(state_dict, name, first), config=config)
    if isinstance(update, Mapping):
        specs, keys_given = describe(update, name)
        devices = {x.device: key for key, x in update.items()}
        if len(devices) > 1:
            where = " and ".join(f"{key} on {device}" for device, key in devices.items())
            raise UpdateError(f"{name} has {where}; move it to one device")
        return Update(name, specs, keys_given, update, next(iter(devices), torch.device("cpu")))
    if isinstance(update, str | os.PathLike):
        name = f"{name} ({os.fspath(update)})"
        folder = AdapterFolder(update, name)
        return Update(name, folder.specs, {key: key for key in folder.specs}, folder, torch.device("cpu"), folder.config)
    raise UpdateError(f"{name}: expected a state dict or a PEFT folder, got {type(update).__name__}")


def _looks(tensors: StateDict) -> tuple[list, ...]:
    """Keys and kinds of tensors, to be compared as a whole: a fraction of a microsecond for each."""
    values = tensors.values()
    if not {*map(type, values)} <= {Tensor, Parameter}:
        return ()  # looks like nothing that needs no parsing
    return list(tensors), *([get(x) for x in values] for get in map(attrgetter, ("shape", "dtype", "device", "layout")))


def open_updates(updates: Sequence[UpdateLike], names: Sequence[str] | None = None) -> list[Update]:
    """All clients' updates, not yet checked against each other; by default they are called client 0, client 1, …"""
    if isinstance(updates, Mapping | str | os.PathLike) or not isinstance(updates, Iterable):
        raise UpdateError("updates must be a sequence of state dicts or folders, one per client; put a single one in a list")
    if names is not None and (len(names) != len(updates) or len(set(names)) < len(names)):
        raise UpdateError(
            f"{len(updates)} updates with the names {', '.join(map(str, names))}; pass one each, all different"
        )
    opened: list[Update] = []
    for i, update in enumerate(updates):
        opened.append(open_update(update, names[i] if names else f"client {i}", opened[0] if opened else None))
    if not opened:
        raise UpdateError("no updates: pass at least one client's state dict or folder")
    return opened


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
