"""Checks of values against the types that a configuration's fields are declared with."""

import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "left out"}


class _WrongTypeError(Exception):
    """A value that the type does not have."""


def check_type(name: str, value: Any, hint: Any) -> Any:
    """Return a value as plain Python data of the declared type.

    A number of NumPy becomes one of Python and a path becomes text, so that a configuration can be saved.

    Args:
        name: the field, for the error.
        value: the value.
        hint: the declared type.

    Raises:
        ValueError: a value of another type, or a choice that there is not.
    """
    try:
        return _convert(value, hint)
    except _WrongTypeError:
        raise ValueError(f"{name} must be {_describe(hint)}, got {value!r}") from None


def _convert(value: Any, hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return _first_that_fits(value, get_args(hint))
    kind = get_origin(hint) or hint
    if kind is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    elif kind in (int, float):
        fits = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        if fits and type(value) not in (int, float):
            value = int(value) if isinstance(value, Integral) else float(value)
    elif kind is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        fits = isinstance(value, str)
    elif kind in (list, tuple):  # PEFT takes tuples and sets for lists
        fits = isinstance(value, Sequence | set) and not isinstance(value, str)
        if fits and (own := get_args(hint)):
            for x in value:
                _convert(x, own[0])
    elif kind is dict:
        fits = isinstance(value, Mapping)
    else:
        fits = not isinstance(kind, type) or isinstance(value, kind | Mapping)
    if not fits:
        raise _WrongTypeError
    return value


def _first_that_fits(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint)
        except _WrongTypeError:
            continue
    raise _WrongTypeError


def _describe(hint: Any) -> str:
    """Say in words what a type takes."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        # In an order of its own: two unions of the same types are one object, with the order of the one that was made first.
        words = dict.fromkeys(map(_describe, get_args(hint)))
        return " or ".join(sorted(words, key=lambda word: (word == _WORDS[type(None)], word == _WORDS[str])))
    if kind is Literal:
        return "one of " * (len(get_args(hint)) > 1) + ", ".join(map(str, get_args(hint)))
    if kind in (list, tuple):
        return "a list"
    if kind is dict or kind not in _WORDS:
        return "a mapping"
    return _WORDS[kind]
