"""Factors that PEFT stacks, one adapter per expert: LoRA on the parameters of a module (target_parameters).

A parameter (E, d_out, d_in) has factors A (E·r, d_in), the expert slowest, and B (d_out, E·r), the expert fastest. Keys name
the module and not its parameter; a second parameter of the module stands a ``base_layer`` deeper.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from ..errors import UpdateError
from .config import PREFIX, rank_of, scaling
from .keys import TensorSpec, parse_factor
from .patterns import compiled

# Modules whose parameters Transformers has in one tensor for all experts, and which only parameters are targets of.
_EXPERTS = re.compile(r"(^|\.)(experts|input_linear|output_linear)$")
_LEVEL = ".base_layer"
_ESCAPE = re.compile(r"\\(.)")
_KNOWN_ORDER = {"down_proj", "gate_up_proj"}  # of Transformers' modules: the first stands outside, the second within
_MOST_PARAMETERS = 6  # of one module, whose orders are tried


@dataclass(frozen=True)
class Stack:
    """The factors of one parameter.

    Attributes:
        parameter: the parameter's name, with the module's.
        key_A, key_B: the keys of its factors.
        experts: E, 1 for a parameter that is a matrix.
    """

    parameter: str
    key_A: str
    key_B: str
    experts: int


def find_stacks(specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None, client: str) -> list[Stack]:
    """Find the factors of parameters.

    Args:
        specs: key → spec of an adapter's tensors.
        config: the LoRA configuration, without which the number of experts is unknown, or None.
        client: the client's name in errors.

    Raises:
        UpdateError: factors of experts without a configuration, or of a rank that the configuration does not have.
    """
    keys: dict[str, tuple[str, str]] = {}
    for key in specs:
        if (p := parse_factor(key)) and _rows(pair := (key, p.partner) if p.factor == "A" else (p.partner, key), specs):
            keys[p.module] = pair
    levels: dict[str, list[str]] = {}  # a module → its factors' modules, the outermost first
    for module in keys:
        levels.setdefault(_without_levels(module), []).append(module)
    targets = _targets(config, client)
    stacks: list[Stack] = []
    for module, nested in levels.items():
        nested.sort(key=len)
        if config is None and (len(nested) > 1 or _EXPERTS.search(module)):
            key = next(key for key in keys[nested[0]] if key in specs)
            raise UpdateError(
                f"{client}, {key} {specs[key].shape}: factors of a parameter of all experts (target_parameters) stack an "
                "adapter per expert, and only the LoRA configuration tells how many; pass it, as configs=, as (state dict, "
                "configuration), or in a folder"
            )
        if config is None or not targets:
            continue
        if parameters := _parameters(module, len(nested), targets, config):
            stacks += _stacks([keys[name] for name in nested], parameters, specs, config, client)
    return stacks


def _rows(pair: tuple[str, str], specs: Mapping[str, TensorSpec]) -> int:
    """The rows of A and columns of B, of which there may be one factor; 0 if they do not fit, which ``Layout`` refuses."""
    A, B = (specs[key].shape if key in specs else None for key in pair)
    if any(shape is not None and len(shape) != 2 for shape in (A, B)):
        return 0
    found = {shape[axis] for axis, shape in enumerate((A, B)) if shape is not None}
    return found.pop() if len(found) == 1 else 0


def _targets(config: Mapping[str, Any] | None, client: str) -> list[str]:
    targets = (config or {}).get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UpdateError(f"{client}: target_parameters is {str(targets)[:80]!r}; expected a list of names")
    return targets


def _without_levels(module: str) -> str:
    while module.endswith(_LEVEL):
        module = module.removesuffix(_LEVEL)
    return module


def _parameters(module: str, levels: int, targets: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """The parameters of a module that may be the targets, by name; none if the module itself is one."""
    containers = [target.rpartition(".") for target in targets]
    own = {name for container, _, name in containers if container and f".{module}".endswith(f".{container}")}
    if levels > len(own) and not _is_target(module.removeprefix(PREFIX), config.get("target_modules")):
        own |= {name for container, _, name in containers if not container}
    return sorted(own)[:_MOST_PARAMETERS] if len(own) >= levels else []


def _is_target(name: str, targets: Any) -> bool:
    """Whether a module is a target itself, and not by its parameters."""
    if not isinstance(targets, str):
        return any(name == target or name.endswith(f".{target}") for target in targets or () if isinstance(target, str))
    if name in (_ESCAPE.sub(r"\1", alternative) for alternative in targets.split("|")):
        return True
    try:
        return compiled((targets,)).first(name) is not None
    except re.error:
        return False


def _stacks(
    keys: Sequence[tuple[str, str]],
    parameters: Sequence[str],
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    client: str,
) -> list[Stack]:
    """Which of a module's parameters has which factors: those whose ranks give all of them one number of experts.

    PEFT wraps parameters in the order in which the module has them, which only the model tells; that of Transformers'
    modules is known. Where several orders fit and agree in rank and scaling, the names in a report may be exchanged.
    """
    module = _without_levels(parse_module(keys[0][0]))
    fitting: dict[tuple[tuple[int, float], ...], list[Stack]] = {}
    # gate_up_proj comes before down_proj in Transformers' modules, and stands deeper.
    for order in permutations(parameters, len(keys)):
        names = [f"{module}.{name}" for name in order]
        ranks = [rank_of(config, name, client) for name in names]
        rows = [_rows(pair, specs) for pair in keys]
        counts = {n // r for n, r in zip(rows, ranks, strict=True)}
        if len(counts) == 1 and all(n % r == 0 for n, r in zip(rows, ranks, strict=True)) and 0 not in counts:
            kind = tuple((r, scaling(config, name, r, client)) for r, name in zip(ranks, names, strict=True))
            E = counts.pop()
            fitting.setdefault(kind, [Stack(name, *pair, E) for name, pair in zip(names, keys, strict=True)])
    if fitting and len(keys) == len(parameters) and {*parameters} == _KNOWN_ORDER:
        return next(iter(fitting.values()))
    if len(fitting) != 1:
        shapes = " and ".join(f"{key} {specs[key].shape}" for pair in keys for key in pair if key in specs)
        told = ", ".join(sorted({f"{name}: {rank_of(config, f'{module}.{name}', client)}" for name in parameters}))
        raise UpdateError(
            f"{client}, {shapes}: {'no' if not fitting else 'more than one'} order of the parameters fits the ranks of the "
            f"LoRA configuration ({told}), a multiple of which each factor must have, one for every expert; pass the "
            "configuration that it was trained with"
        )
    return next(iter(fitting.values()))


def parse_module(key: str) -> str:
    """The module of a factor's key."""
    parsed = parse_factor(key)
    assert parsed is not None
    return parsed.module


def parameter_of(module: str) -> str | None:
    """The parameter that a module is one of several experts of; None if it is no expert, whose names end in a number."""
    return module.rpartition("[")[0] or None
