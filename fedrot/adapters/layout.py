"""The adapters that an update's keys and shapes form, and the layout that all clients must have."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UpdateError
from .keys import DTYPES, TensorSpec, is_unknown_to_lora, parse_factor
from .names import explain_renaming, find_renaming
from .recent import Recent


@dataclass(frozen=True)
class Adapter:
    """One LoRA pair, A (r, d_in) and B (d_out, r), convolutions flattened: ΔW = s·B·A."""

    module: str
    key_A: str
    key_B: str
    rank: int
    d_in: int
    d_out: int
    dtype: torch.dtype


class AdapterGroup:
    """Adapters of equal rank, shape and dtype, whose tensors are worked on together."""

    def __init__(self, adapters: list[Adapter]):
        self.adapters = adapters

    def all_A(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """A of every adapter of the group, (r, d_in)."""
        return [as_matrix(tensors[a.key_A]) for a in self.adapters]

    def A(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A of all adapters of the group, (G, r, d_in), copied together."""
        return torch.stack(self.all_A(tensors)).detach()

    def B(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """B of all adapters of the group, (G, d_out, r), copied together."""
        return torch.stack(self.all_B(tensors)).detach()

    def all_B(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """B of every adapter of the group, (d_out, r)."""
        return [as_matrix(tensors[a.key_B]) for a in self.adapters]


def as_matrix(x: Tensor) -> Tensor:
    """A factor as a matrix; that of a convolution flattened."""
    return x if x.dim() == 2 else x.flatten(1)


class Layout:
    """The keys, shapes and dtypes that the updates of one federation have in common, and the adapters that these form.

    Keys are canonical: those of a saved PEFT adapter, whichever form the caller's state dict used.

    Args:
        specs: canonical key → spec, as ``describe`` returns it.
        client: the client's name in errors.

    Attributes:
        specs: as given.
        adapters: the LoRA pairs.
        factor_keys: the keys of A and B of every adapter.
        other_keys: the keys of all other tensors that are averaged, such as heads and biases.
        counters: the keys of integers, which are carried along.
        has_matrices: whether all factors are matrices, and none is that of a convolution.
        groups: the adapters, those of equal shape together.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], client: str):
        self.specs = dict(specs)
        self.adapters = tuple(_pair(specs, client))
        self.factor_keys = tuple((a.key_A, a.key_B) for a in self.adapters)
        factors = {key for keys in self.factor_keys for key in keys}
        others = [key for key in specs if key not in factors]
        self.other_keys = tuple(key for key in others if specs[key].dtype in DTYPES)
        self.counters = tuple(key for key in others if specs[key].dtype not in DTYPES)
        self.has_matrices = all(len(specs[key].shape) == 2 for key in factors)
        groups: dict[tuple[Any, ...], list[Adapter]] = {}
        for a in self.adapters:
            groups.setdefault((a.rank, a.d_in, a.d_out, a.dtype), []).append(a)
        self.groups = tuple(AdapterGroup(adapters) for adapters in groups.values())

    @classmethod
    def of(cls, specs: Mapping[str, TensorSpec], client: str) -> "Layout":
        """The layout of specs, the same one as the last time for the same mapping, which is not changed."""
        if (known := _LAYOUTS.get(id(specs))) is None:
            known = specs, cls(specs, client)  # the mapping is kept, so that no other one has its id
            _LAYOUTS.put(id(specs), known)
        return known[1]

    def check(self, specs: Mapping[str, TensorSpec], client: str, first: str) -> None:
        """Raise UpdateError unless a client's keys, shapes and dtypes are this layout's, which the client ``first`` has."""
        self.check_keys(specs, client, first)
        for key, mine in self.specs.items():
            theirs = specs[key]
            if theirs.shape != mine.shape:
                raise UpdateError(
                    f"{client}, {key}: shape {theirs.shape}, but {first} has {mine.shape}; "
                    "all clients must use the same ranks and the same base model"
                )
            if theirs.dtype != mine.dtype:
                raise UpdateError(
                    f"{client}, {key} {theirs.shape}: {theirs.dtype}, but {first} has {mine.dtype}; convert all to one dtype"
                )

    def check_keys(self, specs: Mapping[str, TensorSpec], client: str, first: str) -> None:
        """Raise UpdateError unless a client's keys are this layout's, which the client ``first`` has."""
        missing = [key for key in self.specs if key not in specs]
        extra = [key for key in specs if key not in self.specs]
        if not missing and not extra:
            return
        cure = "all clients must send the same keys"
        if found := find_renaming(specs, self.specs):
            cure += f"; {explain_renaming(found)} its modules would be those of {first}: use one version of the model's code"
        if missing:
            raise UpdateError(f"{client} lacks {_listed(missing)}, which {first} has; {cure}")
        raise UpdateError(f"{client} has {_listed(extra)}, which {first} lacks; {cure}")

    def check_reference(self, specs: Mapping[str, TensorSpec], name: str, first: str) -> None:
        """Raise UpdateError unless a reference has the layout's adapters. Its other tensors do not matter."""
        theirs = {key for key in specs if parse_factor(key)}
        for a in self.adapters:
            for key in (a.key_A, a.key_B):
                if key not in specs:
                    raise UpdateError(f"{name} lacks {key}, which {first} has; pass the adapter clients started from")
                if specs[key].shape != self.specs[key].shape:
                    raise UpdateError(
                        f"{name}, {key}: shape {specs[key].shape}, but {first} has {self.specs[key].shape}; "
                        "pass the adapter that the clients started from"
                    )
        if extra := theirs - self.specs.keys():
            raise UpdateError(f"{name} has {_listed(sorted(extra))}, which {first} lacks")


_LAYOUTS = Recent[int, tuple[Mapping[str, TensorSpec], Layout]](8)


def _pair(specs: Mapping[str, TensorSpec], client: str) -> list[Adapter]:
    adapters = []
    for key, spec in specs.items():
        if is_unknown_to_lora(key):
            raise UpdateError(
                f"{client}, {key} {spec.shape}: not a tensor of LoRA or DoRA; variants with tensors of their own "
                "(KaSA, AdaLoRA, …) are not supported"
            )
        if (parsed := parse_factor(key)) is None:
            continue
        if parsed.partner not in specs:
            raise UpdateError(f"{client}: {key} {spec.shape} is without its {parsed.partner}; send both factors")
        if parsed.factor == "A":
            adapters.append(_adapter(parsed.module, key, spec, parsed.partner, specs[parsed.partner], client))
    if not adapters:
        instead = "; average virtual tokens as they are" if "prompt_embeddings" in specs else ""
        raise UpdateError(
            f"{client} has no lora_A/lora_B pair among its {len(specs)} keys{_example(specs)}; only LoRA adapters can be "
            f"aligned, as peft.get_peft_model_state_dict(model) returns them{instead}"
        )
    return adapters


def _adapter(module: str, key_A: str, A: TensorSpec, key_B: str, B: TensorSpec, client: str) -> Adapter:
    shapes = f"{client}, {key_A} {A.shape} and {key_B} {B.shape}"
    if len(A.shape) < 2 or len(B.shape) < 2:
        raise UpdateError(f"{shapes}: expected (r, d_in, …) and (d_out, r, …); were sharded parameters gathered?")
    if A.shape[0] != B.shape[1] or math.prod(B.shape[2:]) != 1:
        raise UpdateError(
            f"{shapes}: the ranks {A.shape[0]} and {B.shape[1]} differ; grouped convolutions and block-diagonal variants "
            "cannot be rotated. If it is neither, were sharded parameters gathered before they were saved?"
        )
    if A.dtype != B.dtype:
        raise UpdateError(f"{shapes}: {A.dtype} and {B.dtype}; convert both factors to one dtype")
    return Adapter(module, key_A, key_B, A.shape[0], math.prod(A.shape[1:]), B.shape[0], A.dtype)


def _example(specs: Mapping[str, TensorSpec]) -> str:
    return f" (such as {next(iter(specs))})" if specs else ""


def _listed(keys: list[str]) -> str:
    return f"{keys[0]}" + (f" and {len(keys) - 1} more keys" if len(keys) > 1 else "")
