"""The options of a comparison in layers: the preset, the YAML file above it, the command line on top.

An upper layer replaces what a lower one sets, in whatever way it sets it: ``clients: 50`` laid over
``vary: {clients: [3, 10]}`` gives 50 clients, for every method. Variants keep their own fields, which define them.
"""

import copy
from typing import Any

from jsonargparse import get_loader

from .fields import LISTS, drop_field, has_field

Options = dict[str, Any]


def overlay(lower: Options, upper: Options) -> Options:
    """Lay options over others; the upper layer's count where they differ.

    ``method``, ``strength``, ``start`` and ``seed``, as a run's config.yaml has them, are lists of one, unless the lists are
    there too.

    Raises:
        ValueError: a layer that sets and varies a field at once, or is no mapping of options.
    """
    upper = copy.deepcopy(upper)
    vary, per_method = upper.pop("vary", None) or {}, upper.pop("per_method", None) or {}
    variants = upper.pop("variants", None) or {}
    if not isinstance(vary, dict):
        raise ValueError(f"vary must map fields to lists of values, got {vary!r}")
    for option, of, fields in (("per_method", "methods", per_method), ("variants", "names", variants)):
        if not isinstance(fields, dict) or not all(isinstance(own, dict) for own in fields.values()):
            raise ValueError(f"{option} must map {of} to fields with values, got {fields!r}")
    for name, plural in LISTS.items():
        value = upper.pop(name, None)  # a run's strength is None where it plays no part
        if value is not None:
            upper.setdefault(plural, [value])
    for name in vary:
        if has_field(upper, name):
            raise ValueError(f"{name} is both set and varied: do one of them")
    result = without(lower, [*upper, *vary])
    result |= upper
    if vary:
        result["vary"] = result.get("vary", {}) | vary
    for option, fields in (("per_method", per_method), ("variants", variants)):
        for name, own in fields.items():
            result[option] = result.get(option, {})
            result[option][name] = result[option].get(name, {}) | own
    return result


def without(options: Options, names: list[str]) -> Options:
    """Return the options without those that set or vary these fields."""
    if not {"lora", "lora.lora_alpha"}.isdisjoint(names):
        names = [*names, "lora_scaling"]  # which would set α again
    result = copy.deepcopy(options)
    vary, per_method = result.pop("vary", {}), result.pop("per_method", {})
    for name in names:
        result = drop_field(result, name)
        vary = {field: values for field, values in vary.items() if not (field == name or field.startswith(f"{name}."))}
        per_method = {method: drop_field(own, name) for method, own in per_method.items()}
    return result | ({"vary": vary} if vary else {}) | ({"per_method": per_method} if per_method else {})


def split_options(argv: list[str]) -> tuple[Options, list[str], list[str]]:
    """Split a command line into the options that are laid over each other and the rest, which the parser reads.

    Returns:
        The layer of ``--vary FIELDS``, ``--vary.FIELD VALUES…``, ``--per_method.METHOD.FIELD VALUE``,
        ``--variants.NAME FIELDS`` and ``--variants.NAME.FIELD VALUE``, with ``preset`` and ``config`` if given; the other
        arguments; and the fields that they set.
    """
    layer: Options = {}
    rest: list[str] = []
    fields: list[str] = []
    for name, values, tokens in option_groups(argv):
        first, _, field = name.partition(".")
        loaded = [get_loader("yaml")(value) for value in values]
        if first in ("preset", "config") and len(values) == 1:
            layer[first] = values[0]
        elif first == "vary" and field and loaded:
            values = loaded[0] if len(loaded) == 1 and isinstance(loaded[0], list) else loaded
            layer = overlay(layer, {"vary": {field: values}})
        elif first == "per_method" and "." in field and len(loaded) == 1:
            method, _, field = field.partition(".")
            # Names of methods have dashes, those of fields have underscores.
            layer = overlay(layer, {"per_method": {method.replace("_", "-"): {field: loaded[0]}}})
        elif first == "variants" and field and len(loaded) == 1:
            variant, _, field = field.partition(".")
            own = {field.replace("-", "_"): loaded[0]} if field else loaded[0]
            layer = overlay(layer, {"variants": {variant: own}})
        elif first in ("vary", "per_method", "variants") and not field and len(loaded) == 1:
            layer = overlay(layer, {first: loaded[0]})
        else:
            rest += tokens
            fields += [name] if name else []
    return layer, rest, fields


def option_groups(argv: list[str]) -> list[tuple[str, list[str], list[str]]]:
    """Group the arguments by option: its name, its values and its tokens. Those before the first option have no name."""
    groups: list[tuple[str, list[str], list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            groups.append((name, [value] if equals else [], [token]))
        else:
            if not groups:
                groups.append(("", [], []))
            groups[-1][1].append(token)
            groups[-1][2].append(token)
    return groups
