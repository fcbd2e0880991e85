"""What a merged adapter has of tensors that are no LoRA factors: heads, saved modules, biases, trained tokens."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedrot_kernels import average

from ..adapters.config import PREFIX
from ..adapters.keys import TensorSpec, parse_factor
from ..adapters.layout import Layout
from ..adapters.update import Update
from ..errors import UpdateError

ModulesToSave = Literal["mean", "first", "drop"]

# Weights by which models read tokens, and which their heads share where they are tied.
_END = re.compile(r"(^|\.)(embed_tokens|wte|shared|word_embeddings|lm_head|embed_out|proj_out|output_projection)\.weight$")
_BIAS = ".lora_B.bias"  # of a factor, and scaled as B is


class BaseWeights:
    """A base model's folder, read tensor by tensor.

    Args:
        path: a folder that save_pretrained wrote, with safetensors files.

    Raises:
        UpdateError: no such folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        index = self.path / "model.safetensors.index.json"
        try:
            names = (
                {*json.loads(index.read_text("utf-8"))["weight_map"].values()} if index.is_file() else {"model.safetensors"}
            )
            self._files: list[Any] = [safe_open(self.path / Path(name).name, framework="pt") for name in sorted(names)]
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
            raise UpdateError(
                f"base: {self.path} has no weights in safetensors files ({error}); pass the folder of the base model, as "
                "save_pretrained writes it"
            ) from error

        config = self.path / "config.json"
        try:
            self._ties = config.is_file() and bool(json.loads(config.read_text("utf-8")).get("tie_word_embeddings", True))
        except (ValueError, AttributeError) as error:
            raise UpdateError(f"base: {config} is not JSON ({error}); pass the folder of the base model") from error

    def read(self, key: str, spec: TensorSpec) -> Tensor:
        """Read the tensor that a key of a saved adapter stands for.

        Raises:
            UpdateError: the base model lacks it, or has it in another shape.
        """
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        files = {known: file for file in self._files for known in file.keys()}  # noqa: SIM118, a safe_open is no mapping
        if name not in files and self._ties and _END.search(name):  # Transformers saves a shared weight once
            shared = [known for known in files if _END.search(known)]
            name = shared[0] if len(shared) == 1 else name
        if name in files:
            x: Tensor = files[name].get_tensor(name)
            if tuple(x.shape) != spec.shape:
                raise UpdateError(f"base: {name} is {tuple(x.shape)} in {self.path}, but the adapters have {spec.shape}")
            return x
        raise UpdateError(f"base: {self.path} has no {name} {spec.shape}; pass the model that the adapters were trained on")


def check_heads(adapters: Sequence[Update], layout: Layout) -> None:
    """Raise UpdateError if a module that one adapter has LoRA on is saved whole by another."""
    adapted = {a.module: next(x for x in adapters if a.key_A in x.specs) for a in layout.adapters}
    for key in (*layout.other_keys, *layout.counters):
        parts = key.split(".")
        for i in range(1, len(parts)):
            module = ".".join(parts[:i])
            rest = parts[i]
            if module in adapted and rest != "base_layer" and not rest.startswith(("lora_", "trainable_tokens")):
                whose = next(x for x in adapters if key in x.specs)
                raise UpdateError(
                    f"{whose.name} has {key} {whose.specs[key].shape}, the whole module, on which {adapted[module].name} "
                    "has LoRA; a model cannot have both, leave one of them out"
                )


def keep_saved(adapters: Sequence[Update], policy: ModulesToSave) -> list[Update]:
    """The adapters with what the policy takes of tensors that are no factors: all, the first of each key, or none."""
    kept, seen = [], set[str]()
    for adapter in adapters:
        others = {key for key in adapter.specs if parse_factor(key) is None and not key.endswith(_BIAS)}
        left_out = {"mean": set[str](), "first": others & seen, "drop": others}[policy]
        seen |= others
        kept.append(replace(adapter, specs={key: spec for key, spec in adapter.specs.items() if key not in left_out}))
    return kept


def merge_saved(
    adapters: Sequence[Update],
    weights: Sequence[float],
    layout: Layout,
    policy: ModulesToSave,
    base: BaseWeights | None,
) -> dict[str, Tensor]:
    """Merge the tensors that are no factors.

    Args:
        adapters: the adapters.
        weights: one per adapter.
        layout: the layout of all their tensors.
        policy: "mean", by the weights; "first", those of the first adapter that has them; or "drop".
        base: has what an adapter lacks and did not change, or None.

    Raises:
        UpdateError: a tensor that an adapter lacks, or negative weights, in a mean.
    """
    keys = [key for key in layout.other_keys if not key.endswith(_BIAS)]
    if policy == "drop":
        return {}
    having = {key: [x for x in adapters if key in x.specs] for key in (*keys, *layout.counters)}
    merged = {key: _carry(key, having[key], policy) for key in layout.counters}
    if policy == "first":
        return merged | {key: having[key][0][key].detach().to(layout.specs[key].dtype, copy=True) for key in keys}
    if keys and any(w < 0 for w in weights):
        raise UpdateError(
            f"{keys[0]} {layout.specs[keys[0]].shape} has no mean by negative weights; take the first adapter's "
            '(modules_to_save="first", --modules-to-save first), or leave such tensors out ("drop")'
        )
    tensors = [[_read(key, adapter, having[key][0], layout.specs[key], base) for adapter in adapters] for key in keys]
    if keys:
        merged |= zip(keys, average(tensors, list(weights))[0], strict=True)
    return merged


def _read(key: str, adapter: Update, other: Update, spec: TensorSpec, base: BaseWeights | None) -> Tensor:
    """An adapter's tensor, or else the base model's, which the adapter did not change."""
    if key in adapter.specs:
        return adapter[key].detach().to(spec.dtype)
    if base is not None:
        return base.read(key, spec).to(adapter.device, spec.dtype)
    raise UpdateError(
        f"{adapter.name} lacks {key}, which {other.name} has in shape {spec.shape}; pass the folder of the base model, "
        "whose tensor it left as it was (base=, --base DIR), take that of the first adapter that has one "
        '(modules_to_save="first", --modules-to-save first), or leave such tensors out ("drop")'
    )


def _carry(key: str, having: Sequence[Update], policy: ModulesToSave) -> Tensor:
    """The largest of the adapters' counters, or the only value of other integers."""
    first = having[0][key].detach().clone()
    for adapter in having[1:] if policy == "mean" else ():
        x = adapter[key]
        if first.numel() == 1:
            first = torch.maximum(first, x)
        elif not torch.equal(first, x):
            raise UpdateError(f"{adapter.name}, {key} {tuple(x.shape)}: integers that differ from {having[0].name}'s")
    return first


def saved_fields(adapters: Sequence[Update], policy: ModulesToSave) -> dict[str, Any]:
    """The fields of a merged adapter's configuration that say what is saved beside the factors."""
    if policy == "drop":
        return {"modules_to_save": None, "bias": "none", "trainable_token_indices": None}
    listed = [(adapter.config or {}).get("modules_to_save") for adapter in adapters]
    names = {name for names in listed if isinstance(names, list) for name in names}
    return {"modules_to_save": sorted(names) or None}
