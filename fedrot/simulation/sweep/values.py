"""Values of varied fields, and the names that they have in folders and tables."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .fields import typed


@dataclass(frozen=True)
class Value:
    """One value of a varied field.

    Attributes:
        value: the value, of the field's type.
        name: what folders call it.
    """

    value: Any
    name: str

    @property
    def column(self) -> Any:
        """The entry in a table of results: a number as it is, so that it can be plotted, and anything else as text."""
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        return self.value if number else _text(self.value)


def typed_values(option: str, field: str, given: Sequence[Any]) -> list[Value]:
    """Convert values to the field's type, with names that differ.

    Args:
        option: where the values stand, for the error, such as vary.clients.
        field: the field, such as clients.
        given: the values.

    Raises:
        ValueError: a value of another type, or one that is given twice.
    """
    values = [typed(field, value) for value in given]
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{option} has {value!r} twice")
    names = [folder_name(_text(value)) for value in values]
    if len(set(names)) < len(names) or not all(names):
        names = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
    return [Value(value, name) for value, name in zip(values, names, strict=True)]


def folder_name(name: str) -> str:
    """Return the last 40 characters of a name, without those that do not belong into a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_")[-40:]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
