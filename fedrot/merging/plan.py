"""The adapters of a merge, opened and checked, with the layout and the weights of their union."""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from torch import Tensor

from ..adapters.checks import own_scalings
from ..adapters.keys import parse_factor
from ..adapters.layout import Layout
from ..adapters.storage import Storage
from ..adapters.update import Update, UpdateLike, open_updates
from ..errors import UpdateError
from .rename import Rename, check_names, rename
from .saved import BaseWeights, ModulesToSave, check_heads, keep_saved, merge_saved, saved_fields
from .union import check_plain, union_config, union_layout, union_storage, without_base


@dataclass(frozen=True)
class MergePlan:
    """The adapters of a merge, of weights that are not zero.

    Attributes:
        adapters: the adapters, without base weights.
        weights: adapter → its weight in the sum, as it is applied; negative to subtract.
        layout: the layout of the union of their modules, in the largest ranks and the widest dtypes.
        storage: where the union lies in a state dict.
        scalings: module → s of the first adapter of the largest rank.
        saved: key → what the result has of tensors that are no factors, base weights included.
        config: the union's adapter_config.json.
    """

    adapters: list[Update]
    weights: dict[str, float]
    layout: Layout
    storage: Storage
    scalings: dict[str, float]
    saved: dict[str, Tensor]
    config: dict[str, Any]

    def at_rank(self, rank: int) -> "MergePlan":
        """The same plan, every module of at least this rank."""
        return replace(self, layout=union_layout(self.adapters, rank))


def plan_merge(
    adapters: Sequence[UpdateLike],
    weights: Sequence[float] | None,
    names: Sequence[str] | None,
    *,
    rank: int = 0,
    normalize: bool = True,
    modules_to_save: ModulesToSave = "mean",
    base: str | os.PathLike[str] | None = None,
    renaming: Rename | None = None,
) -> MergePlan:
    """Open the adapters of a merge, and check that they can be merged; see ``fedrot.merge``.

    Args:
        adapters, weights, names, normalize, modules_to_save, base: as there.
        rank: the least rank of every module of the layout.
        renaming: as ``rename`` there.

    Raises:
        UpdateError: adapters that do not fit each other, or whose update is not a plain s·B·A.
    """
    opened = open_updates(adapters, names, alike=False)
    values = _check_weights(weights, opened)
    if renaming:
        renamed = [rename(adapter, renaming) for adapter in opened]
        if all(new.specs == old.specs for new, old in zip(renamed, opened, strict=True)):
            raise UpdateError(f"no adapter has a module whose name begins with {' or '.join(renaming)}; nothing to rename")
        opened = renamed
    for adapter in opened:
        check_plain(adapter, opened[0])
    _warn_of_unlike_bases(opened)
    kept = [(adapter, w) for adapter, w in zip(opened, values, strict=True) if w]
    bare, base_weights = without_base([adapter for adapter, _ in kept])
    if renaming != {}:
        check_names(bare)
    bare = keep_saved(bare, modules_to_save)
    _warn_of_strangers(bare)
    layout = union_layout(bare, rank)
    check_heads(bare, layout)
    applied = [w for _, w in kept]
    saved = merge_saved(bare, applied, layout, modules_to_save, None if base is None else BaseWeights(base))
    s = _scalings(bare, layout)
    config = union_config(bare, layout, s) | saved_fields(bare, modules_to_save)
    shares = _normalize(applied) if normalize else applied
    by_name = dict(zip((adapter.name for adapter in bare), shares, strict=True))
    storage = union_storage(bare, layout, [*base_weights])
    config["ensure_weight_tying"] = any((adapter.config or {}).get("ensure_weight_tying") for adapter in bare)
    return MergePlan(bare, by_name, layout, storage, s, saved | base_weights, config)


def _check_weights(weights: Sequence[float] | None, adapters: Sequence[Update]) -> list[float]:
    """The weights as floats; UpdateError unless they are finite numbers, one per adapter, and not all zero."""
    given = [1.0] * len(adapters) if weights is None else list(weights)
    if len(given) != len(adapters):
        raise UpdateError(f"{len(given)} weights for {len(adapters)} adapters; pass one per adapter")
    for adapter, w in zip(adapters, given, strict=True):
        if isinstance(w, bool) or not isinstance(w, Real) or not math.isfinite(w):
            raise UpdateError(f"{adapter.name} has weight {w!r}; weights are finite numbers, negative ones subtract")
    if not any(given):
        raise UpdateError("all weights are zero; at least one adapter must count")
    return [float(w) for w in given]


def _normalize(weights: Sequence[float]) -> list[float]:
    largest = max(map(abs, weights))
    total = math.fsum(w / largest for w in weights)
    if abs(total) < 1e-9:
        raise UpdateError(
            f"the weights {', '.join(f'{w:g}' for w in weights)} sum to zero and cannot be divided by their sum; add the "
            "adapters as they are weighted (normalize=False, --normalize no)"
        )
    return [w / largest / total for w in weights]


def _scalings(adapters: Sequence[Update], layout: Layout) -> dict[str, float]:
    """module → s of the first adapter of the largest rank."""
    scalings = [own_scalings(adapter, layout) for adapter in adapters]
    s = {}
    for a in layout.adapters:
        having = [(x.specs[a.key_A].shape[0], i) for i, x in enumerate(adapters) if a.key_A in x.specs]
        s[a.module] = scalings[max(having, key=lambda pair: pair[0])[1]][a.module]
    return s


def _warn_of_strangers(adapters: Sequence[Update]) -> None:
    """Warn of an adapter that has no module in common with any other: they may be of two models."""
    keys = [{key for key in adapter.specs if parse_factor(key)} for adapter in adapters]
    for adapter, own, others in ((adapters[i], keys[i], keys[:i] + keys[i + 1 :]) for i in range(len(adapters))):
        if others and own.isdisjoint(set().union(*others)):
            warnings.warn(
                f"{adapter.name} has no module in common with the others, and is merged beside them; are they of one base "
                "model?",
                stacklevel=4,
            )
            return


def _warn_of_unlike_bases(adapters: Sequence[Update]) -> None:
    bases = sorted({str((adapter.config or {}).get("base_model_name_or_path")) for adapter in adapters})
    if len(bases) > 1:  # not an error, because paths differ between machines
        warnings.warn(
            f"the adapters name the base models {', '.join(bases)}; merging makes sense for one base model", stacklevel=4
        )
