"""Where an adapter's tensors lie in its state dict, for adapters that do not have them there one by one.

Factors of experts are stacked in one tensor, and PEFT saves an adapter of tied weights (``ensure_weight_tying``) twice, the
second time transposed. Everything beyond this room works on one pair A, B per expert, and on a tied adapter once.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UpdateError
from .config import base_config
from .copies import find_copies, is_copy
from .experts import find_stacks, parse_module
from .keys import TensorSpec, parse_factor

_EXPERT = re.compile(r"\[\d+\]$")


@dataclass(frozen=True)
class Storage:
    """How a state dict holds an adapter.

    Attributes:
        saved: key of a saved adapter → the caller's key, in the caller's order.
        parts: key of a saved adapter → the canonical keys of what it holds: one per expert, or one.
        copies: key of a saved adapter → the canonical key of the factor that it repeats, transposed.
    """

    saved: dict[str, str]
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    @property
    def specs_differ(self) -> bool:
        """Whether the canonical tensors are not those of the state dict, one by one."""
        return bool(self.parts or self.copies)

    @property
    def tied_modules(self) -> dict[str, str]:
        """Module of a copy → the module whose adapter it repeats. PEFT's patterns know both by name."""
        return {parse_module(key): parse_module(original) for key, original in self.copies.items()}

    def sources(self, key: str) -> tuple[str, ...]:
        """The canonical keys of what a key of a saved adapter holds."""
        return (self.copies[key],) if key in self.copies else self.parts.get(key, (key,))

    def unpack_specs(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The specs by canonical key, from those of a saved adapter."""
        unpacked = {}
        for key, spec in specs.items():
            if key not in self.copies:
                for part in self.sources(key):
                    unpacked[part] = TensorSpec(_part_shape(key, spec.shape, len(self.sources(key))), spec.dtype)
        return unpacked

    def pack_specs(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The specs of a saved adapter, copies included, from those by canonical key."""
        packed = {}
        for key in self.saved:
            first, n = specs[self.sources(key)[0]], len(self.sources(key))
            shape = first.shape
            if key in self.copies:
                shape = shape[::-1]
            elif n > 1:
                shape = (n * shape[0], shape[1]) if _is_A(key) else (shape[0], n * shape[1])
            packed[key] = TensorSpec(shape, first.dtype)
        return packed

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Lay canonical tensors where a state dict has them, under the caller's keys; missing ones are left out."""
        if not self.specs_differ:
            return {given: tensors[key] for key, given in self.saved.items() if key in tensors}
        packed = {}
        for key, given in self.saved.items():
            sources = self.sources(key)
            if not all(part in tensors for part in sources):
                continue
            if key in self.copies:
                packed[given] = tensors[sources[0]].mT.contiguous()
            else:
                packed[given] = stack([tensors[part] for part in sources], key)
        return packed

    def pack_factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Lay factors of any rank under the keys of a saved adapter. Copies are left out."""
        held = {part: key for key, parts in self.parts.items() for part in parts}
        packed = {}
        for part, x in tensors.items():
            key = held.get(part, part)
            if key not in packed:
                packed[key] = stack([tensors[name] for name in self.parts[key]], key) if key in self.parts else x
        return packed

    def base_config(self, base_update: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        """The adapter_config.json of a base update, whose keys are those of a saved adapter; see ``config.base_config``."""
        ranks, parameters = {}, set()
        for key, x in base_update.items():
            if _is_A(key):
                parts = self.sources(key)
                name = parse_module(parts[0])
                if key in self.parts:
                    name = _EXPERT.sub("", name)
                    parameters.add(name)
                ranks[name] = x.shape[0] // len(parts)
        return base_config(ranks, parameters, config)


class Unpacked(Mapping[str, Tensor]):
    """The tensors of a state dict by canonical key, in the memory of the state dict."""

    def __init__(self, tensors: Mapping[str, Tensor], storage: Storage):
        self._tensors = tensors
        self._last: tuple[str, Tensor] | None = None  # a stack of a file is read once for all its experts
        self._places = {
            part: (key, i, len(storage.sources(key)))
            for key in storage.saved
            if key not in storage.copies
            for i, part in enumerate(storage.sources(key))
        }
        self._given = storage.saved

    def __getitem__(self, key: str) -> Tensor:
        saved, i, n = self._places[key]
        if n == 1:
            return self._tensors[self._given[saved]]
        if self._last is None or self._last[0] != saved:
            self._last = (saved, self._tensors[self._given[saved]])
        x = self._last[1]
        return x.reshape(n, -1, *x.shape[1:])[i] if _is_A(saved) else x[:, i::n]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def find_storage(
    specs: Mapping[str, TensorSpec],
    saved: dict[str, str],
    read: Callable[[str], Tensor],
    config: Mapping[str, Any] | None,
    client: str,
    like: Storage | None = None,
) -> Storage:
    """Find how a state dict holds an adapter.

    Args:
        specs: key of a saved adapter → spec.
        saved: key of a saved adapter → the caller's key.
        read: reads the tensor of a key of a saved adapter.
        config: the LoRA configuration, if it is known.
        client: the client's name in errors.
        like: how other clients' state dicts hold theirs; then copies must be where theirs are.

    Raises:
        UpdateError: factors of experts without a configuration that fits them, or copies of one adapter that differ.
    """
    if config is None and like is not None and like.parts:
        parts = _parts_like(like.parts, specs, client)
    else:
        parts = find_parts(specs, config, client)
    if like is not None:
        if wrong := next((key for key, x in like.copies.items() if not is_copy(key, x, specs, read)), None):
            raise UpdateError(
                f"{client}, {wrong} {specs[wrong].shape if wrong in specs else 'is missing'}: no transpose of "
                f"{like.copies[wrong]}, of which it is a copy in the other updates (tied weights, ensure_weight_tying); "
                "load the adapter into PEFT and save it again"
            )
        return Storage(saved, parts, like.copies)
    return Storage(saved, parts, find_copies(specs, read))


def find_parts(specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None, client: str) -> dict[str, tuple[str, ...]]:
    """Find the factors that hold those of several experts, or of one parameter; see ``Storage.parts``.

    Raises:
        UpdateError: factors of experts without a configuration that fits them.
    """
    parts = {}
    for s in find_stacks(specs, config, client):
        names = [s.parameter] if s.experts == 1 else [f"{s.parameter}[{e}]" for e in range(s.experts)]
        for key, factor in ((s.key_A, "A"), (s.key_B, "B")):
            if key not in specs:
                continue
            parts[key] = tuple(f"{name}.lora_{factor}.weight" for name in names)
    taken = [part for key in specs for part in parts.get(key, (key,))]
    if len(set(taken)) < len(taken):
        raise UpdateError(f"{client}: two of its keys name the same expert of {next(iter(parts))}; send one adapter")
    return parts


def _parts_like(
    parts: Mapping[str, tuple[str, ...]], specs: Mapping[str, TensorSpec], client: str
) -> dict[str, tuple[str, ...]]:
    """The parts of an adapter whose configuration is unknown, as another client's."""
    found = {key: names for key, names in parts.items() if key in specs}
    for key, names in found.items():
        shape = specs[key].shape
        if len(shape) != 2 or shape[0 if _is_A(key) else 1] % len(names):
            raise UpdateError(f"{client}, {key}: shape {shape}, no multiple of the {len(names)} experts that others have")
    return found


def stack(parts: list[Tensor], key: str) -> Tensor:
    """The tensor that holds the factors of one parameter's experts, or the only tensor."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if _is_A(key) else torch.stack(parts, dim=2).flatten(1)


def _part_shape(key: str, shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
    if experts == 1:
        return shape
    return (shape[0] // experts, *shape[1:]) if _is_A(key) else (shape[0], shape[1] // experts)


def _is_A(key: str) -> bool:
    parsed = parse_factor(key)
    return parsed is not None and parsed.factor == "A"
