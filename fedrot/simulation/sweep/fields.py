"""Fields of a configuration by name, such as clients, or lora.r within lora: their types, and mappings of some of them."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from peft import LoraConfig

from ...options import refuse_old_spellings
from ..config import SimulationConfig

# Fields that have a list of their own in a comparison.
LISTS = {"method": "methods", "strength": "strengths", "start": "starts", "seed": "seeds"}


def typed(name: str, value: Any) -> Any:
    """Convert a value to the field's type: a number that is written as text becomes one."""
    return get_field(parse(set_fields({}, {name: value})), name)


def parse(common: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a configuration to the types that they are declared with, and add the defaults of others."""
    parsed = _parse_as(SimulationConfig, common, "")
    _parse_as(LoraConfig, parsed["lora"], "lora: ")
    return parsed


def _parse_as(kind: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return dict(vars(_parser(kind).parse_object(values)))
    except ArgumentError as error:
        raise ValueError(where + " ".join(str(error).split())) from error


@cache
def _parser(kind: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    return parser


def check_field(name: str) -> None:
    """Refuse a name that is no field of a configuration, or that a comparison has a list of."""
    if name in LISTS:
        raise ValueError(f"{name} has a list of its own in a comparison: {LISTS[name]}")
    if name.startswith("lora."):
        return  # PEFT knows its options
    if name not in (known := [f.name for f in fields(SimulationConfig)]):
        raise ValueError(
            f"there is no field {name!r} to set or vary; the fields are lora.r and so on, and {', '.join(known)}"
        )


def check_shapes(own: Mapping[str, Any]) -> None:
    """Refuse a comparison's own option that is no list, or no mapping, where it must be one.

    Args:
        own: the options by name, all of ``Comparison``.
    """
    for name in LISTS.values():
        if isinstance(own[name], str) or not isinstance(own[name], Sequence):
            raise ValueError(f"{name} must be a list, got {own[name]!r}")
    for name in ("fields", "vary", "per_method", "variants"):
        if not isinstance(own[name], Mapping):
            raise ValueError(f"{name} must be a mapping, got {own[name]!r}")
    for method, fields_of_method in own["per_method"].items():
        if not isinstance(fields_of_method, Mapping):
            raise ValueError(f"per_method.{method} must map fields to values, got {fields_of_method!r}")
    if unknown := [name for name in own["methods"] if not isinstance(name, str)]:
        raise ValueError(f"methods must be names, got {unknown[0]!r}")


def refuse_old_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option or a value of fedrot 0.1, naming what replaces it.

    Args:
        options: options of a simulation or a comparison; those below vary, per_method and variants are looked at too.
    """
    refuse_old_spellings(options)
    lists = {**{name: options.get(plural) for name, plural in LISTS.items()}, **_mapping(options.get("vary"))}
    for name, values in lists.items():
        for value in values if isinstance(values, list | tuple) and values else [values]:
            refuse_old_spellings({name: value})
    for owner in ("per_method", "variants"):
        for own in _mapping(options.get(owner)).values():
            refuse_old_spellings(_mapping(own))


def _mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, or an empty one: what should be a mapping and is not is refused elsewhere."""
    return value if isinstance(value, Mapping) else {}


def get_field(common: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, such as clients, or lora.r within lora."""
    outer, _, inner = name.partition(".")
    return common[outer][inner] if inner else common[outer]


def has_field(common: Mapping[str, Any], name: str) -> bool:
    """Whether the field is set."""
    outer, _, inner = name.partition(".")
    return outer in common and (not inner or inner in common[outer])


def set_fields(common: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with some of them changed."""
    result = dict(common)
    for name, value in changes.items():
        outer, _, inner = name.partition(".")
        result[outer] = {**result.get(outer, {}), inner: value} if inner else value
    return result


def drop_field(common: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the fields without this one and those within it."""
    outer, _, inner = name.partition(".")
    if not inner:
        return {other: value for other, value in common.items() if not overlap(outer, other)}
    kept = {other: value for other, value in common.items() if other != name}
    return kept | {outer: drop_field(kept[outer], inner)} if outer in kept else kept


def overlap(name: str, other: str) -> bool:
    """Whether two fields are one, or one is within the other."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")
