"""A comparison: what it varies, and the runs that follow from that. Everything is checked before anything is run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations, product
from typing import Any, get_args

from ...methods.registry import METHODS
from ..config import SimulationConfig, Start
from .fields import LISTS, check_field, check_shapes, has_field, overlap, parse, refuse_old_options, set_fields, typed
from .values import Value, folder_name, typed_values

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
        per_method: method → fields that differ for this method alone, such as lr. If the field is varied, its value here is
            a list, as long as that in ``vary``, of the values that the method has in their place.
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
        values = {name: typed_values(f"vary.{name}", name, others) for name, others in self.vary.items()}
        settings = self._settings()
        runs: dict[str, Run] = {}
        notes: dict[str, None] = {}
        for places in product(*(range(len(others)) for others in values.values())):
            for start, setting in product(self.starts, settings):
                method = METHODS[setting.method]
                if start == "independent" and method.needs_shared_start:
                    said = f"{setting.name} was not run from an independent start: its clients must begin with one adapter"
                    notes[said] = None
                    continue
                varied = {name: (values | setting.varied)[name][at] for name, at in zip(values, places, strict=True)}
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
        per_method, varied = {}, {}
        for method, own in self.per_method.items():
            per_method[method] = {name: typed(name, x) for name, x in own.items() if name not in self.vary}
            varied[method] = {
                name: typed_values(f"per_method.{method}.{name}", name, x) for name, x in own.items() if name in self.vary
            }
        settings = []
        for method in self.methods:
            strengths = self.strengths if "strength" in METHODS[method].uses else self.strengths[:1]
            own, values = per_method.get(method, {}), varied.get(method, {})
            settings.append(_Setting(method, method, method, own, values, strengths))
        for name, variant in self.variants.items():
            own = {field: typed(field, x) for field, x in variant.items()}
            method = own.pop("method", "fedrot")
            own, values = {**per_method.get(method, {}), **own}, varied.get(method, {})
            settings.append(_Setting(name, folder_name(name), method, own, values, [None]))
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
        owned = [name for own in (*self.per_method.values(), *self.variants.values()) for name in own]
        if self.fields.get("lora_scaling") is not None and "lora.lora_alpha" in [*self.vary, *owned]:
            raise ValueError("lora_scaling sets lora.lora_alpha for all runs: set or vary one of the two")
        for name, others in self.vary.items():
            if isinstance(others, str) or not isinstance(others, Sequence) or not others:
                raise ValueError(f"vary.{name} must be a list of values, got {others!r}")
            if has_field(self.fields, name):
                raise ValueError(f"{name} is both set and varied: do one of them")
            self._check_own_of(name)
        for name, other in combinations(self.vary, 2):
            if overlap(name, other):
                raise ValueError(f"{name} and {other} cannot both be varied")

    def _check_own_of(self, name: str) -> None:
        """Refuse methods and variants that set a varied field, but for a method's list of as many values."""
        for method, own in self.per_method.items():
            values = own.get(name)
            if isinstance(values, list | tuple) and len(values) != len(self.vary[name]):
                number = len(self.vary[name])
                raise ValueError(f"per_method.{method}.{name} must have {number} values, as vary.{name} has, got {values!r}")
            if any(overlap(name, other) for other in own if other != name or not isinstance(values, list | tuple)):
                raise ValueError(
                    f"{name} is varied and per_method sets it for {method}: do one of them, or list as many values there"
                )
        for variant, own in self.variants.items():
            if any(overlap(name, other) for other in own):
                raise ValueError(f"{name} is varied and is set by variant {variant}: do one of them")

    def _check_variants(self) -> None:
        # Names of methods as tables and as folders have them.
        taken = {name: f"the method {method}" for method in METHODS for name in self._names(method)}
        for name, own in self.variants.items():
            if not isinstance(name, str) or not folder_name(name):
                raise ValueError(f"variants: {name!r} is no name: take letters and digits, quoted if need be")
            if not isinstance(own, Mapping):
                raise ValueError(f"variants.{name} must map fields to values, got {own!r}")
            for shown in {name, folder_name(name)}:
                if shown in taken:
                    raise ValueError(f"the variant {name!r} cannot be told from {taken[shown]}: give it another name")
            taken |= dict.fromkeys((name, folder_name(name)), f"the variant {name!r}")
            for key, value in own.items():
                if key not in ("method", "strength"):
                    check_field(key)
                elif key == "method" and value not in METHODS:
                    raise ValueError(f"variants.{name}: unknown method {value!r}; known methods: {', '.join(METHODS)}")

    def _names(self, method: str) -> list[str]:
        strengths = self.strengths if "strength" in METHODS[method].uses else ()
        return [method, *(f"{method}{between}{x:g}" for between in ("-", " λ=") for x in strengths)]


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
    """A method with its strengths, or a variant, whose strengths are [None]: its own fields or its method give λ.

    Attributes:
        own: its own fields that are not varied.
        varied: its own values of fields that are.
    """

    name: str
    folder: str
    method: str
    own: Mapping[str, Any]
    varied: dict[str, list[Value]]
    strengths: Sequence[float | None]
