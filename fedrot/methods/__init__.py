"""The registry of aggregation methods: one name for the API, the command line and the simulator."""

from ..alignment import Alignment
from .base import Method
from .fedit import FedIT
from .fedrot import FedRot

METHODS: dict[str, type[Method]] = {method.name: method for method in (FedIT, FedRot)}


def get_method(name: str, alignment: Alignment) -> Method:
    """The method of that name.

    Raises:
        ValueError: no such method.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name](alignment)


__all__ = ["METHODS", "Method", "get_method"]
