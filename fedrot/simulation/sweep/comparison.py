"""A comparison: what it varies, and the runs that follow from that. Everything is checked before anything is run."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations, product
from typing import Any, get_args

from ...methods.registry import METHODS
from ..config import SimulationConfig, Start
from .fields import LISTS, check_field, check_shapes, has_field, overlap, parse, refuse_old_options, set_fields, typed

# Options that play no part in some methods, which then are run once for all values. A simulation's seed plays one in all.
_OF_SOME_METHODS = frozenset[str]().union(*(method.uses for method in METHODS.values())) - {"seed"}


@dataclass(frozen=True)
class Comparison:
    """Methods × strengths × starts × seeds × the values of any other fields, and variants beside the methods.

    Attributes:
        fields: the fields of SimulationConfig that all runs have in common; the others have their defaults.
        methods: names in the registry.
        strengths: values of λ. Methods that use λ are run with each of them.
        starts: the starts. Every method is run from each of them that it can be run from.
        seeds: the seeds. Everything is run with each of them.
        vary: field → its values. Options of LoRA are lora.r, lora.lora_alpha and so on. A method that does not use the field
            is run once.
        per_method: method → fields that differ for this method alone, such as lr.
        variants: name → fields of a setting that is run beside the methods, once per start, seed and varied values, whatever
            the strengths. Its method is fedrot unless it sets one. It has its method's per_method too, but its own fields
            win.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    methods: Sequence[str] = ("fedit", "fedrot")
    strengths: Sequence[float] = (0.5, 1.0)
    starts: Sequence[Start] = get_args(Start)
    seeds: Sequence[int] = (0, 1, 2)
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    per_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Comparison":
        """Make a comparison of the options of ``fedrot compare``: its own, and fields of the runs.

        The method "all" stands for all methods.
        """
        own = {name: options[name] for name in (f.name for f in fields(cls)) if name in options and name != "fields"}
        if list(own.get("methods", ())) == ["all"]:
            own["methods"] = list(METHODS)
        return cls({name: value for name, value in options.items() if name not in own}, **own)

    def runs(self) -> tuple[list["Run"], list[str]]:
        """Return all runs, and a line for each method or variant that is not run from every start.

        Raises:
            ValueError: an unknown method or field, a value of a wrong type, a spelling of fedrot 0.1, a field that is set in
                two ways, a variant whose name is taken, or no run.
        """
        self._check()
        # Types are checked once per value, not per run, of which there may be hundreds.
        common = parse({"lora": SimulationConfig().lora, **self.fields})
        values = {name: self._values(name) for name in self.vary}
        settings = self._settings()
        runs: dict[str, Run] = {}
        notes: dict[str, None] = {}
        for chosen in product(*values.values()):
            varied = dict(zip(values, chosen, strict=True))
            for start, setting in product(self.starts, settings):
                method = METHODS[setting.method]
                if start == "independent" and method.needs_shared_start:
                    said = f"{setting.name} was not run from an independent start: its clients must begin with one adapter"
                    notes[said] = None
                    continue
                own = {name: value for name, value in varied.items() if name in method.uses or name not in _OF_SOME_METHODS}
                for seed, strength in product(self.seeds, setting.strengths):
                    shown = "strength" in method.uses and strength is not None
                    name = f"{start}-{setting.folder}" + (f"-{strength:g}" if shown else "")
                    name += "".join(f"-{field}={value.name}" for field, value in own.items()) + f"-seed{seed}"
                    if name in runs:
                        continue
                    changes = {"method": setting.method, "start": start, "seed": seed}
                    changes |= {} if strength is None else {"strength": strength}
                    changes |= {field: value.value for field, value in own.items()}
                    columns = {"start": start, "method": setting.name, "seed": seed}
                    columns |= {"strength": strength if shown else math.nan}
                    columns |= {field: value.column for field, value in own.items()}
                    config = SimulationConfig(**set_fields(set_fields(common, changes), setting.own))
                    runs[name] = Run(name, config, columns)
        if not runs:
            raise ValueError("; ".join(notes) or "nothing to compare: name a method, a strength, a start and a seed")
        return list(runs.values()), list(notes)

    def _settings(self) -> list["_Setting"]:
        """The methods, then the variants, with their own fields, converted to the fields' types."""
        per_method = {method: {name: typed(name, x) for name, x in own.items()} for method, own in self.per_method.items()}
        settings = []
        for method in self.methods:
            strengths = self.strengths if "strength" in METHODS[method].uses else self.strengths[:1]
            settings.append(_Setting(method, method, method, per_method.get(method, {}), strengths))
        for name, variant in self.variants.items():
            own = {field: typed(field, x) for field, x in variant.items()}
            method = own.pop("method", "fedrot")
            settings.append(_Setting(name, _folder(name), method, {**per_method.get(method, {}), **own}, [None]))
        return settings

    def _check(self) -> None:
        check_shapes({f.name: getattr(self, f.name) for f in fields(self)})
        refuse_old_options({**self.fields, **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "fields"}})
        for method in [*self.methods, *self.per_method]:
            if method not in METHODS:
                raise ValueError(f"unknown method {method!r}; known methods: {', '.join(METHODS)}")
        for name in [*self.fields, *self.vary, *(name for own in self.per_method.values() for name in own)]:
            check_field(name)
        for name, plural in LISTS.items():
            for value in getattr(self, plural):
                typed(name, value)
        self._check_variants()
        for name, others in self.vary.items():
            if isinstance(others, str) or not isinstance(others, Sequence) or not others:
                raise ValueError(f"vary.{name} must be a list of values, got {others!r}")
            if has_field(self.fields, name):
                raise ValueError(f"{name} is both set and varied: do one of them")
            for what, owned in (("per_method sets it for", self.per_method), ("is set by variant", self.variants)):
                for owner, own in owned.items():
                    if any(overlap(name, other) for other in own):
                        raise ValueError(f"{name} is varied and {what} {owner}: do one of them")
        for name, other in combinations(self.vary, 2):
            if overlap(name, other):
                raise ValueError(f"{name} and {other} cannot both be varied")

    def _check_variants(self) -> None:
        # Names of methods as tables and as folders have them.
        taken = {name: f"the method {method}" for method in METHODS for name in self._names(method)}
        for name, own in self.variants.items():
            if not isinstance(name, str) or not _folder(name):
                raise ValueError(f"variants: {name!r} is no name: take letters and digits, quoted if need be")
            if not isinstance(own, Mapping):
                raise ValueError(f"variants.{name} must map fields to values, got {own!r}")
            for shown in {name, _folder(name)}:
                if shown in taken:
                    raise ValueError(f"the variant {name!r} cannot be told from {taken[shown]}: give it another name")
            taken |= dict.fromkeys((name, _folder(name)), f"the variant {name!r}")
            for key, value in own.items():
                if key not in ("method", "strength"):
                    check_field(key)
                elif key == "method" and value not in METHODS:
                    raise ValueError(f"variants.{name}: unknown method {value!r}; known methods: {', '.join(METHODS)}")

    def _names(self, method: str) -> list[str]:
        strengths = self.strengths if "strength" in METHODS[method].uses else ()
        return [method, *(f"{method}{between}{x:g}" for between in ("-", " λ=") for x in strengths)]

    def _values(self, name: str) -> list["_Value"]:
        """The values of a varied field, converted to the field's type, with names that differ."""
        values = [typed(name, value) for value in self.vary[name]]
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"vary.{name} has {value!r} twice")
        names = [_folder(_text(value)) for value in values]
        if len(set(names)) < len(names) or not all(names):
            names = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
        return [_Value(value, name) for value, name in zip(values, names, strict=True)]


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        name: the name of its folder.
        config: what to run.
        columns: the columns that tell it from the others: start, method (or the variant's name), seed, strength (NaN for
            methods that do not use it, and for variants), and the varied fields that the method uses.
    """

    name: str
    config: SimulationConfig
    columns: dict[str, Any]


@dataclass(frozen=True)
class _Setting:
    """A method with its strengths, or a variant, whose strengths are [None]: its own fields or its method give λ."""

    name: str
    folder: str
    method: str
    own: Mapping[str, Any]
    strengths: Sequence[float | None]


@dataclass(frozen=True)
class _Value:
    value: Any
    name: str

    @property
    def column(self) -> Any:
        """The entry in a table of results: a number as it is, so that it can be plotted, and anything else as text."""
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        return self.value if number else _text(self.value)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _folder(name: str) -> str:
    """The last 40 characters of a name, without those that do not belong into a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_")[-40:]
