"""Renaming an adapter's modules, and telling when that is needed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..adapters.config import PREFIX, rank_of, scaling, whole_name
from ..adapters.keys import parse_factor
from ..adapters.names import begins_with, explain_renaming, find_renaming, rename_module
from ..adapters.storage import Storage
from ..adapters.update import Update
from ..errors import UpdateError

Rename = Mapping[str, str]


def rename(update: Update, names: Rename) -> Update:
    """Rename an adapter's modules by the beginnings of their names.

    Args:
        update: the adapter, with its configuration.
        names: what a name begins with → what it is to begin with instead; whole parts of names, without
            ``base_model.model.``.

    Raises:
        UpdateError: two modules would have one name.
    """

    def new_name(name: str) -> str:
        bare = name.removeprefix(PREFIX)
        for old, new in names.items():
            old, new = old.strip("."), new.strip(".")
            if begins_with(new, old) and begins_with(bare, new):
                continue  # it has the new name already, which begins with the old one
            changed = rename_module(bare, old, new)
            if changed != bare:
                return (PREFIX if name.startswith(PREFIX) else "") + changed
        return name

    keys = {key: new_name(key) for key in update.specs}
    if len(set(keys.values())) < len(keys):
        raise UpdateError(f"{update.name}: renaming {_show(names)} gives two of its tensors one name")
    stored = update.storage
    storage = Storage(
        {new_name(key): given for key, given in stored.saved.items()},
        {new_name(key): tuple(map(new_name, parts)) for key, parts in stored.parts.items()},
        {new_name(key): new_name(original) for key, original in stored.copies.items()},
    )
    return replace(
        update,
        specs={keys[key]: spec for key, spec in update.specs.items()},
        keys_given={keys[key]: given for key, given in update.keys_given.items()},
        config=None if update.config is None else _rename_config(update, new_name),
        storage=storage,
    )


def _rename_config(update: Update, new_name: Callable[[str], str]) -> dict[str, Any]:
    """The configuration with ranks and α of every module spelt out, because patterns may fit old names only."""
    config = dict(update.config or {})
    ranks, alphas = {}, {}
    for key in update.specs:
        if (p := parse_factor(key)) and p.factor == "A":
            name, r = whole_name(new_name(p.module)), rank_of(config, p.module, update.name)
            s = scaling(config, p.module, r, update.name)
            ranks[name], alphas[name] = r, s * (r**0.5 if config.get("use_rslora") else r)
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    for field in ("target_modules", "modules_to_save", "target_parameters"):
        if isinstance(listed := config.get(field), list):
            config[field] = [new_name(name) if isinstance(name, str) else name for name in listed]
    return config


def check_names(adapters: Sequence[Update]) -> None:
    """Raise UpdateError if two adapters have the same modules under unlike names."""
    saved = [any(key.startswith(PREFIX) for key in adapter.specs) for adapter in adapters]
    if len(set(saved)) > 1:
        with_it, without = adapters[saved.index(True)].name, adapters[saved.index(False)].name
        raise UpdateError(
            f"the keys of {with_it} begin with {PREFIX}, as PEFT saves them, and those of {without} do not; put it before "
            "them, as get_peft_model_state_dict does"
        )
    for adapter in adapters[1:]:
        if found := find_renaming(adapter.specs, adapters[0].specs):
            raise UpdateError(
                f"{adapter.name} has no module of {adapters[0].name}, but {explain_renaming(found)} its modules are of the "
                f"same shapes: rename them, with rename={{{found[0]!r}: {found[1]!r}}} or --rename {found[0]}={found[1]}. "
                "If they are other modules, pass rename={} or --rename none"
            )


def _show(names: Rename) -> str:
    return ", ".join(f"{old}={new}" for old, new in names.items())
