"""The tensors of N clients, each read once for all calls of a round."""

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import overload

from torch import Tensor

from .tensors import TensorTable, describe


class TensorColumns(Sequence[list[Tensor]]):
    """The same tensors of N clients: per chosen place a list of N, whose places in memory are known.

    Args:
        tables: one per client, of one signature.
        places: the places of the chosen tensors in every table.

    Attributes:
        clients: N.
        firsts: the first client's tensors.
        kinds: the kinds of every client's tensors, as in ``TensorTable``.

    Raises:
        ValueError: tables of other kinds than the first.
    """

    __slots__ = ("_places", "_tables", "clients", "firsts", "kinds")

    def __init__(self, tables: Sequence[TensorTable], places: Sequence[int]):
        first = tables[0]
        if any(table.kinds != first.kinds for table in tables):
            raise ValueError("tables of tensors of one kind each are needed")
        self._tables, self._places, self.clients = tables, places, len(tables)
        self.firsts = [first.tensors[place] for place in places]
        self.kinds = first.choose_kinds(places)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> list[Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Tensor]]: ...

    def __getitem__(self, index: int | slice) -> list[Tensor] | list[list[Tensor]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        place = self._places[index]
        return [table.tensors[place] for table in self._tables]

    def are_plain(self) -> bool:
        """Whether all are contiguous, on a CPU and floating-point."""
        return describe(self.kinds, len(self), 1)[1]

    def addresses(self) -> "array[int]":
        """Where the tensors lie, N per place."""
        per_client = ([table.addresses[place] for place in self._places] for table in self._tables)
        return array("Q", chain.from_iterable(zip(*per_client, strict=True)))
