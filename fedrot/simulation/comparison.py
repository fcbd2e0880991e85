"""What a comparison varies, and the runs that this makes. Everything is checked before anything is run."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import combinations, product
from typing import Any, get_args

from jsonargparse import ArgumentError, ArgumentParser
from peft import LoraConfig

from ..methods import METHODS
from .config import SimulationConfig, Start

# What has a list of its own.
LISTS = {"method": "methods", "strength": "strengths", "start": "starts", "seed": "seeds"}
# What plays no part in a method that does not rotate, which then is run once for all values.
_OF_ROTATION = ("strength", "align_on", "group")


@dataclass(frozen=True)
class Comparison:
    """Methods × strengths × starts × seeds × the values of any other fields.

    Attributes:
        fields: what the runs have in common: fields of SimulationConfig, its defaults for the others.
        methods: names in the registry.
        strengths: the λ to run methods with that rotate.
        starts, seeds: each gets a run of each.
        vary: field → its values. Options of LoRA are lora.r, lora.lora_alpha and so on.
        per_method: method → fields that it alone has otherwise, such as another lr.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    methods: Sequence[str] = ("fedit", "fedrot")
    strengths: Sequence[float] = (0.5, 1.0)
    starts: Sequence[Start] = get_args(Start)
    seeds: Sequence[int] = (0, 1, 2)
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    per_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Comparison":
        """From the options of ``fedrot compare``: its own, and fields of the runs. The method "all" is all of them."""
        own = {name: options[name] for name in (f.name for f in fields(cls)) if name in options and name != "fields"}
        if list(own.get("methods", ())) == ["all"]:
            own["methods"] = list(METHODS)
        return cls({name: value for name, value in options.items() if name not in own}, **own)

    def runs(self) -> tuple[list["Run"], list[str]]:
        """All runs, and a line for each method that is not run from every start.

        Raises:
            ValueError: an unknown method or field, a value of a wrong type, a field that is set in two ways, or no run.
        """
        self._check()
        # Types are checked once per value, not per run, of which there may be hundreds.
        common = _parse({"lora": SimulationConfig().lora, **self.fields})
        values = {name: self._values(name) for name in self.vary}
        own_fields = {method: {name: _typed(name, x) for name, x in own.items()} for method, own in self.per_method.items()}
        runs: dict[str, Run] = {}
        notes: dict[str, None] = {}
        for chosen in product(*values.values()):
            varied = dict(zip(values, chosen, strict=True))
            for start, method, seed, strength in product(self.starts, self.methods, self.seeds, self.strengths):
                rotates = METHODS[method].rotates
                if start == "independent" and METHODS[method].needs_shared_start:
                    notes[f"{method} was not run from an independent start: its clients must begin with one adapter"] = None
                    continue
                own = {name: value for name, value in varied.items() if rotates or name not in _OF_ROTATION}
                name = f"{start}-{method}" + (f"-{strength:g}" if rotates else "")
                name += "".join(f"-{field}={value.name}" for field, value in own.items()) + f"-seed{seed}"
                if name in runs:
                    continue
                changes = {"method": method, "strength": strength, "start": start, "seed": seed}
                changes |= {field: value.value for field, value in own.items()} | own_fields.get(method, {})
                columns = {"start": start, "method": method, "seed": seed, "strength": strength if rotates else math.nan}
                columns |= {field: value.column for field, value in own.items()}
                runs[name] = Run(name, SimulationConfig(**set_fields(common, changes)), columns)
        if not runs:
            raise ValueError("; ".join(notes) or "nothing to compare: name a method, a strength, a start and a seed")
        return list(runs.values()), list(notes)

    def _check(self) -> None:
        for method in [*self.methods, *self.per_method]:
            if method not in METHODS:
                raise ValueError(f"unknown method {method!r}; known methods: {', '.join(METHODS)}")
        for name in [*self.fields, *self.vary, *(name for own in self.per_method.values() for name in own)]:
            _check_field(name)
        for name, plural in LISTS.items():
            for value in getattr(self, plural):
                _typed(name, value)
        for name, others in self.vary.items():
            if isinstance(others, str) or not isinstance(others, Sequence) or not others:
                raise ValueError(f"vary.{name} must be a list of values, got {others!r}")
            if has_field(self.fields, name):
                raise ValueError(f"{name} is both set and varied: do one of them")
            for method, own in self.per_method.items():
                if any(overlap(name, other) for other in own):
                    raise ValueError(f"{name} is varied and per_method sets it for {method}: do one of them")
        for name, other in combinations(self.vary, 2):
            if overlap(name, other):
                raise ValueError(f"{name} and {other} cannot both be varied")

    def _values(self, name: str) -> list["_Value"]:
        """The values of a varied field, of the field's type, with names that differ."""
        values = [_typed(name, value) for value in self.vary[name]]
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"vary.{name} has {value!r} twice")
        names = [re.sub(r"[^\w.+-]+", "_", _text(value)).strip("_")[-40:] for value in values]
        if len(set(names)) < len(names) or not all(names):
            names = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
        return [_Value(value, name) for value, name in zip(values, names, strict=True)]


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        name: of its folder.
        config: what to run.
        columns: what tells it from the others: start, method, seed, strength (NaN without rotation), varied fields.
    """

    name: str
    config: SimulationConfig
    columns: dict[str, Any]


@dataclass(frozen=True)
class _Value:
    value: Any
    name: str

    @property
    def column(self) -> Any:
        """In a table of results: numbers as they are, that can be plotted, and anything else as text."""
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        return self.value if number else _text(self.value)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _typed(name: str, value: Any) -> Any:
    """The value as the field has it; a number that is written as text becomes one."""
    return get_field(_parse(set_fields({}, {name: value})), name)


def _parse(common: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, with the types that they are declared with, and the defaults of others."""
    parsed = _parse_as(SimulationConfig, common, "")
    _parse_as(LoraConfig, parsed["lora"], "lora: ")
    return parsed


def _parse_as(kind: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return vars(_parser(kind).parse_object(values))
    except ArgumentError as error:
        raise ValueError(where + " ".join(str(error).split())) from error


@cache
def _parser(kind: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    return parser


def _check_field(name: str) -> None:
    if name in LISTS:
        raise ValueError(f"{name} has a list of its own in a comparison: {LISTS[name]}")
    if name.startswith("lora."):
        return  # PEFT knows its options
    if name not in (known := [f.name for f in fields(SimulationConfig)]):
        raise ValueError(
            f"there is no field {name!r} to set or vary; the fields are lora.r and so on, and {', '.join(known)}"
        )


def get_field(common: Mapping[str, Any], name: str) -> Any:
    """The value of a field, such as clients, or lora.r within lora."""
    outer, _, inner = name.partition(".")
    return common[outer][inner] if inner else common[outer]


def has_field(common: Mapping[str, Any], name: str) -> bool:
    """Whether the field is set."""
    outer, _, inner = name.partition(".")
    return outer in common and (not inner or inner in common[outer])


def set_fields(common: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, some changed."""
    result = dict(common)
    for name, value in changes.items():
        outer, _, inner = name.partition(".")
        result[outer] = {**result.get(outer, {}), inner: value} if inner else value
    return result


def drop_field(common: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields, this one and those within it left out."""
    outer, _, inner = name.partition(".")
    if not inner:
        return {other: value for other, value in common.items() if not overlap(outer, other)}
    kept = {other: value for other, value in common.items() if other != name}
    return kept | {outer: drop_field(kept[outer], inner)} if outer in kept else kept


def overlap(name: str, other: str) -> bool:
    """Whether two fields are one, or one is within the other."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")
