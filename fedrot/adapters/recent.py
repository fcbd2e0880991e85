"""What was computed last, kept for the next time."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A small mapping that forgets what was used least recently.

    Args:
        size: how many entries are kept.
    """

    def __init__(self, size: int):
        self._size, self._entries = size, OrderedDict[K, V]()

    def get(self, key: K) -> V | None:
        """Return the value of a key, or None."""
        value = self._entries.pop(key, None)
        if value is not None:
            self._entries[key] = value
        return value

    def put(self, key: K, value: V) -> None:
        """Keep a value."""
        self._entries[key] = value
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)
