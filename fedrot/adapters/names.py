"""Modules that two adapters have under unlike names, as other versions of one model give them."""

from collections.abc import Mapping

from .config import PREFIX
from .keys import TensorSpec, parse_factor

_TRIED = 4  # modules of one adapter that are looked for in the other


def find_renaming(mine: Mapping[str, TensorSpec], theirs: Mapping[str, TensorSpec]) -> tuple[str, str] | None:
    """Find the beginning of names by which one adapter's modules become another's, which has none of them.

    Args:
        mine, theirs: canonical key → spec of both adapters.

    Returns:
        What my names begin with, and what theirs begin with instead, without the last dot; or None if a module is common, or
        no such beginning gives half of the smaller adapter's modules a counterpart of the same shape.
    """
    shapes, other = _shapes(mine), _shapes(theirs)
    if not shapes or not other or not shapes.keys().isdisjoint(other):
        return None
    for name in sorted(shapes)[:_TRIED]:
        for candidate in other:
            beginnings = _beginnings(name, candidate)
            if beginnings is None:
                continue
            renamed = [rename_module(module, *beginnings) for module in shapes]
            found = sum(other.get(new) == shape for new, shape in zip(renamed, shapes.values(), strict=True))
            if 2 * found >= min(len(shapes), len(other)):
                return beginnings
    return None


def _shapes(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Module → its sizes, but for the rank."""
    factors = [(p, spec.shape) for key, spec in specs.items() if (p := parse_factor(key)) and p.partner in specs]
    A = {p.module: shape[1:] for p, shape in factors if p.factor == "A"}
    B = {p.module: shape[:1] for p, shape in factors if p.factor == "B"}
    return {module.removeprefix(PREFIX): (*shape, *B[module]) for module, shape in A.items() if module in B}


def _beginnings(name: str, other: str) -> tuple[str, str] | None:
    """What stands before the common end of two names, if that has the numbers of layers."""
    a, b = name.split("."), other.split(".")
    common = 0
    while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
        common += 1
    before = a[: len(a) - common], b[: len(b) - common]
    if not common or any(part.isdecimal() for parts in before for part in parts):
        return None
    return ".".join(before[0]), ".".join(before[1])


def begins_with(name: str, beginning: str) -> bool:
    """Whether a name begins with another, whole parts of names taken; every name begins with nothing."""
    return not beginning or name == beginning or name.startswith(f"{beginning}.")


def rename_module(name: str, old: str, new: str) -> str:
    """The name with another beginning, if it begins with ``old``; both are whole parts, without the dot behind them."""
    if old and name != old and not name.startswith(f"{old}."):
        return name
    return (new + name.removeprefix(old) if new else name.removeprefix(old).removeprefix(".")) if old else f"{new}.{name}"


def explain_renaming(found: tuple[str, str]) -> str:
    """Words for what ``find_renaming`` found."""
    old, new = (f"{name}.…" if name else "…" for name in found)
    return f"with {new} for {old} in their names"
