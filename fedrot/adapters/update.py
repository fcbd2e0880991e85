"""Opening what callers pass: state dicts or PEFT folders, with their configurations."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import UpdateError
from .config import check_lora, plain_config
from .folder import AdapterFolder
from .keys import TensorSpec, describe

StateDict = Mapping[str, Tensor]
UpdateLike = StateDict | str | os.PathLike[str] | tuple[StateDict, Any]
Signature = tuple[list[Any], ...]


@dataclass(frozen=True)
class Update(Mapping[str, Tensor]):
    """One client's tensors under canonical keys; a folder's tensors are read one by one when they are needed.

    Attributes:
        name: the client's name in errors and reports.
        specs: canonical key → shape and dtype.
        keys_given: canonical key → the caller's key.
        tensors: the caller's state dict, or the folder.
        device: the device of all tensors.
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
    def signature(self) -> Signature:
        """The keys and kinds of the caller's tensors. A state dict of the same signature needs no parsing."""
        return _signature(self.tensors)

    def without_tensors(self) -> "Update":
        """The same update without its tensors, to check later updates against without keeping this one's memory."""
        kept = replace(self, tensors={})
        if type(self.tensors) is dict:
            kept.__dict__["signature"] = self.signature
        return kept

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[self.keys_given[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def open_update(update: UpdateLike, name: str, first: Update | None = None) -> Update:
    """Open a state dict or a PEFT folder. Tensors of a folder are not read yet.

    Args:
        update: the state dict or folder, or a pair of a state dict and its LoRA configuration.
        name: the client's name in errors.
        first: a client that was opened before. A state dict of the same signature is opened without parsing a key.

    Raises:
        UpdateError: something that is neither, or a tensor that cannot be averaged, by client, key and shape.
    """
    if isinstance(update, Update):
        return update
    if (
        first is not None
        and type(update) is type(first.tensors) is dict
        and (signature := _signature(update))
        and signature == first.signature
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


def _signature(tensors: StateDict) -> Signature:
    """Keys and kinds of tensors, empty for a state dict that must be parsed. A fraction of a microsecond per tensor."""
    values = tensors.values()
    if not {*map(type, values)} <= {Tensor, Parameter}:
        return ()
    return list(tensors), *([get(x) for x in values] for get in map(attrgetter, ("shape", "dtype", "device", "layout")))


def is_name(x: object) -> bool:
    """Whether x can be a client's name: one line of text that can be printed."""
    return isinstance(x, str) and x != "" and x.isprintable()


def open_updates(updates: Sequence[UpdateLike], names: Sequence[str] | None = None) -> list[Update]:
    """Open all clients' updates, which are not checked against each other yet.

    Args:
        updates: one per client.
        names: one per client, all different; None for client 0, client 1, …

    Raises:
        UpdateError: no updates, names that do not fit, or see ``open_update``.
    """
    if isinstance(updates, Mapping | str | os.PathLike) or not isinstance(updates, Iterable):
        raise UpdateError("updates must be a sequence of state dicts or folders, one per client; put a single one in a list")
    if names is not None and (len(names) != len(updates) or len(set(names)) < len(names)):
        raise UpdateError(
            f"{len(updates)} updates with the names {', '.join(map(str, names))}; pass one each, all different"
        )
    if names is not None and not all(map(is_name, names)):
        raise UpdateError(f"names must be lines of text, one per client, got {list(names)}")
    opened: list[Update] = []
    for i, update in enumerate(updates):
        opened.append(open_update(update, names[i] if names else f"client {i}", opened[0] if opened else None))
    if not opened:
        raise UpdateError("no updates: pass at least one client's state dict or folder")
    return opened


def with_configs(clients: Sequence[Update], configs: Any) -> list[Update]:
    """Give clients the LoRA configurations that the caller passed for their state dicts.

    Args:
        clients: the clients, opened.
        configs: a ``peft.LoraConfig`` or the content of an adapter_config.json, for all clients or one each; or None.

    Raises:
        UpdateError: a number of configurations that does not fit, one that is not of LoRA, or one for an update that came
            with its own.
    """
    if configs is None:
        return list(clients)
    one = isinstance(configs, Mapping) or hasattr(configs, "to_dict")
    given = [configs] * len(clients) if one else list(configs)
    if len(given) != len(clients):
        raise UpdateError(f"{len(given)} configs for {len(clients)} updates; pass one for all, or one per update")
    if whose := next((client.name for client in clients if client.config is not None), None):
        raise UpdateError(f"{whose} came with its configuration; configs are for bare state dicts")
    opened = {id(config): plain_config(config) for config in given}
    for client, config in zip(clients, given, strict=True):
        check_lora(opened[id(config)], f"{client.name}: its entry of configs")
    return [replace(client, config=opened[id(config)]) for client, config in zip(clients, given, strict=True)]
