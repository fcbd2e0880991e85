"""Opening what callers pass: state dicts or PEFT folders, with their configurations."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fedrot_kernels.native_backend.tensors import TensorTable, read_tensors

from ..errors import UpdateError
from .config import check_lora, plain_config
from .fits import check_config
from .folder import AdapterFolder
from .keys import TensorSpec, describe
from .recent import Recent
from .storage import Storage, Unpacked, find_storage

StateDict = Mapping[str, Tensor]
UpdateLike = StateDict | str | os.PathLike[str] | tuple[StateDict, Any]
Signature = tuple[Any, ...]


@dataclass(frozen=True)
class Update(Mapping[str, Tensor]):
    """One client's tensors under canonical keys; a folder's tensors are read one by one when they are needed.

    Attributes:
        name: the client's name in errors and reports.
        specs: canonical key → shape and dtype. An adapter of experts has keys for each expert, a tied adapter once.
        keys_given: canonical key → the key in ``tensors``.
        tensors: the caller's state dict, or the folder; by canonical key where ``storage`` differs from them.
        device: the device of all tensors.
        config: the folder's adapter_config.json, or what the caller gave in its place, or None.
        ranks: key of A → rank, where the client's tensors were padded with zeros to others' ranks; else None.
        storage: how the caller's state dict holds the tensors.
    """

    name: str
    specs: dict[str, TensorSpec]
    keys_given: dict[str, str]
    tensors: StateDict
    device: torch.device
    config: dict[str, Any] | None = None
    ranks: dict[str, int] | None = None
    storage: Storage = field(default_factory=lambda: Storage({}))

    @cached_property
    def _read(self) -> tuple[Signature, TensorTable | None]:
        return _read(self.tensors)

    @property
    def signature(self) -> Signature:
        """The keys and kinds of the caller's tensors. A state dict of the same signature needs no parsing."""
        return self._read[0]

    @property
    def table(self) -> TensorTable | None:
        """Where the tensors of a state dict lie, in its order; None unless all are plain and the library reads them."""
        return self._read[1]

    def without_tensors(self) -> "Update":
        """The same update without its tensors, to check later updates against without keeping this one's memory."""
        kept = replace(self, tensors={})
        if type(self.tensors) is dict:
            kept.__dict__["_read"] = self.signature, None
        return kept

    def as_given(self, tensors: StateDict) -> dict[str, Tensor]:
        """Lay tensors by canonical key as the caller's state dict holds them, under its keys; missing ones are left out."""
        return self.storage.pack(tensors)

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[self.keys_given[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def open_update(update: UpdateLike, name: str, first: Update | None = None, config: dict[str, Any] | None = None) -> Update:
    """Open a state dict or a PEFT folder. Tensors of a folder are not read yet.

    Args:
        update: the state dict or folder, or a pair of a state dict and its LoRA configuration.
        name: the client's name in errors.
        first: a client that was opened before. A state dict of the same signature is opened without parsing a key, and one
            without a configuration is laid out as the first client's.
        config: the LoRA configuration of a bare state dict, if it is known.

    Raises:
        UpdateError: something that is neither, or a tensor that cannot be averaged, by client, key and shape.
    """
    if isinstance(update, Update):
        return update
    if isinstance(update, tuple) and len(update) == 2 and (isinstance(update[1], Mapping) or hasattr(update[1], "to_dict")):
        own = plain_config(update[1])
        check_lora(own, f"{name}: its configuration")
        return open_update(update[0], name, first, own)
    if isinstance(update, Mapping):
        read = _read(update)
        if _is_like(read[0], first) and first is not None and (config is None or config == first.config):
            return _another(first, name, update, config, read)
        signature = read[0] if config is None and _is_bare(first) else ()
        if (known := _PARSED.get(signature)) is not None:
            return _another(known, name, update, None, read)
        specs, keys_given = describe(update, name)
        devices = {x.device: key for key, x in update.items()}
        if len(devices) > 1:
            where = " and ".join(f"{key} on {device}" for device, key in devices.items())
            raise UpdateError(f"{name} has {where}; move it to one device")
        bare = Update(name, specs, keys_given, update, next(iter(devices), torch.device("cpu")), config)
        opened = _unpack(bare, first)
        # Whether tied factors repeat each other is a matter of their values.
        if signature and not opened.storage.specs_differ and not any(key.endswith(".lora_embedding_A") for key in specs):
            _PARSED.put(signature, replace(opened, tensors={}))
        return opened
    if isinstance(update, str | os.PathLike):
        name = f"{name} ({os.fspath(update)})"
        folder = AdapterFolder(update, name)
        keys_given = {key: key for key in folder.specs}
        return _unpack(Update(name, folder.specs, keys_given, folder, torch.device("cpu"), folder.config), first)
    raise UpdateError(f"{name}: expected a state dict or a PEFT folder, got {type(update).__name__}")


_PARSED = Recent[Signature, Update](8)
"""Bare state dicts that were opened, without their tensors."""


def _is_bare(first: Update | None) -> bool:
    """Whether an update that is opened after ``first`` is opened as if it were the first."""
    return first is None or (first.config is None and not first.storage.specs_differ)


def _is_like(signature: Signature, first: Update | None) -> bool:
    """Whether it is the signature of a state dict that was opened, whose tensors lie in it one by one."""
    if first is None or first.storage.specs_differ or type(first.tensors) is not dict:
        return False
    return bool(signature) and signature == first.signature


def _another(
    opened: Update,
    name: str,
    tensors: StateDict,
    config: dict[str, Any] | None,
    read: tuple[Signature, TensorTable | None],
) -> Update:
    """A state dict, as it was read, of the same signature as one that was opened."""
    another = Update(name, opened.specs, opened.keys_given, tensors, opened.device, config, None, opened.storage)
    another.__dict__["_read"] = read
    return another


def _unpack(update: Update, first: Update | None) -> Update:
    """The update by canonical keys, whose configuration is checked against its tensors."""
    config = update.config or (first.config if first is not None else None)
    like = None if first is None else first.storage
    storage = find_storage(update.specs, update.keys_given, update.__getitem__, config, update.name, like)
    if storage.specs_differ:
        tensors = Unpacked(update.tensors, storage)
        specs, keys_given = storage.unpack_specs(update.specs), {key: key for key in tensors}
        update = replace(update, specs=specs, keys_given=keys_given, tensors=tensors)
    if update.config is not None:
        check_config(update.config, update.specs, update.name)
    return replace(update, storage=storage)


def _read(tensors: StateDict) -> tuple[Signature, TensorTable | None]:
    """Keys and kinds of tensors, empty for a state dict that must be parsed; and where they lie, if that could be read.

    Takes a fraction of a microsecond per tensor.
    """
    if type(tensors) is not dict or not tensors:
        return (), None
    values = list(tensors.values())
    if (table := read_tensors(values)) is not None:
        return (tuple(tensors), table.kinds), table
    if not {*map(type, values)} <= {Tensor, Parameter} or not _have_memory(values):
        return (), None
    kinds = map(attrgetter, ("shape", "dtype", "device", "layout"))
    return (tuple(tensors), *(tuple(get(x) for x in values) for get in kinds)), None


def _have_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors, which have entries, lie somewhere: those of sparse layouts and freed ones do not."""
    try:
        return all(map(Tensor.data_ptr, tensors))
    except RuntimeError:
        return False


def is_name(x: object) -> bool:
    """Whether x can be a client's name: one line of text that can be printed."""
    return isinstance(x, str) and x != "" and x.isprintable()


def open_updates(
    updates: Sequence[UpdateLike], names: Sequence[str] | None = None, configs: Any = None, *, alike: bool = True
) -> list[Update]:
    """Open all clients' updates, which are not checked against each other yet.

    Args:
        updates: one per client.
        names: one per client, all different; None for client 0, client 1, …
        configs: the LoRA configuration of bare state dicts, a ``peft.LoraConfig`` or the content of an adapter_config.json,
            for all clients or one each; or None.
        alike: whether the updates are of one federation, so that a client without a configuration is laid out as the first.

    Raises:
        UpdateError: no updates, names or configurations that do not fit, or see ``open_update``.
    """
    if isinstance(updates, Mapping | str | os.PathLike) or not isinstance(updates, Iterable):
        raise UpdateError("updates must be a sequence of state dicts or folders, one per client; put a single one in a list")
    updates = list(updates)
    if names is not None and (len(names) != len(updates) or len(set(names)) < len(names)):
        raise UpdateError(
            f"{len(updates)} updates with the names {', '.join(map(str, names))}; pass one each, all different"
        )
    if names is not None and not all(map(is_name, names)):
        raise UpdateError(f"names must be lines of text, one per client, got {list(names)}")
    called = [f"client {i}" for i in range(len(updates))] if names is None else list(names)
    opened: list[Update] = []
    for update, name, config in zip(updates, called, read_configs(configs, called), strict=True):
        opened.append(open_client(update, name, opened[0] if opened and alike else None, config))
    if not opened:
        raise UpdateError("no updates: pass at least one client's state dict or folder")
    return opened


def open_client(update: UpdateLike, name: str, first: Update | None, config: dict[str, Any] | None) -> Update:
    """Open a client's update, with the configuration that the caller passed for bare state dicts.

    Raises:
        UpdateError: a configuration for an update that came with its own, or see ``open_update``.
    """
    opened = open_update(update, name, first, config)
    if config is not None and not isinstance(update, Mapping):
        raise UpdateError(f"{opened.name} came with its configuration; configs are for bare state dicts")
    return opened


def read_configs(configs: Any, names: Sequence[str]) -> list[dict[str, Any] | None]:
    """Read the LoRA configurations that the caller passed for state dicts, one per client.

    Args:
        configs: a ``peft.LoraConfig`` or the content of an adapter_config.json, for all clients or one each; or None.
        names: the clients' names.

    Raises:
        UpdateError: a number of configurations that does not fit, or one that is not of LoRA.
    """
    if configs is None:
        return [None] * len(names)
    one = isinstance(configs, Mapping) or hasattr(configs, "to_dict")
    given = [configs] * len(names) if one else list(configs)
    if len(given) != len(names):
        raise UpdateError(f"{len(given)} configs for {len(names)} updates; pass one for all, or one per update")
    opened = {id(config): plain_config(config) for config in given}
    for name, config in zip(names, given, strict=True):
        check_lora(opened[id(config)], f"{name}: its entry of configs")
    return [opened[id(config)] for config in given]
