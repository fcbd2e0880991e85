"""What a launch may access: the tensors it was given, and those whose addresses stand in a table it was given."""

import ctypes
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import library

POISON = 0x7FA5  # as in global.inc


@dataclass(frozen=True)
class Extent:
    """Bytes begin … end of global memory, with numbers of ``itemsize`` bytes in them."""

    begin: int
    end: int
    itemsize: int
    writable: bool = False


def extent(x: Tensor, *, writable: bool = False) -> Extent:
    """The bytes from a tensor's first element to its last, which need not be all of its storage."""
    elements = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return Extent(x.data_ptr(), x.data_ptr() + elements * x.element_size(), x.element_size(), writable)


def poison(x: Tensor) -> Tensor:
    """Fill a tensor that nothing has written: with NaN that a load reports as uninitialised, and integers with zero.

    Zero, because the kernels' only integers that they write say whether results are finite: one that is not written says no.
    """
    if x.is_floating_point():
        x.view(-1).view(torch.int16).fill_(POISON)
    else:
        x.zero_()
    return x


class Tables:
    """The tensors behind tables of addresses."""

    def __init__(self) -> None:
        self._found: list[Extent] = []
        self._behind: dict[int, tuple[weakref.ref[Tensor], list[Extent]]] = {}

    def add(self, addresses: Iterable[int], shape: torch.Size, itemsize: int) -> None:
        """Note contiguous tensors that the next table holds."""
        size = shape.numel() * itemsize
        self._found += [Extent(p, p + size, itemsize) for p in addresses if size]

    def close(self, table: Tensor) -> None:
        """What was added since the last table is behind this one."""
        self._behind[table.data_ptr()] = (weakref.ref(table), self._found)
        self._found = []

    def behind(self, x: Tensor) -> list[Extent]:
        """The tensors behind x, if it is a table."""
        table, extents = self._behind.get(x.data_ptr(), (lambda: None, []))
        return extents if table() is x else []


def allocations(extents: Sequence[Extent]) -> tuple["ctypes.Array[library.Allocation]", int]:
    """As the core wants them: by address and disjoint. Also the number of traces, of which each number that may be written
    has one. Tensors that overlap become one allocation."""
    merged: list[Extent] = []
    for x in sorted((x for x in extents if x.end > x.begin), key=lambda x: x.begin):
        if merged and x.begin < merged[-1].end:
            y = merged.pop()
            x = Extent(y.begin, max(x.end, y.end), min(x.itemsize, y.itemsize), x.writable or y.writable)
        merged.append(x)
    found, traces = [], 0
    for x in merged:
        granule = x.itemsize.bit_length() - 1
        found.append(library.Allocation(x.begin, x.end, x.writable, granule, traces))
        traces += ((x.end - x.begin) >> granule) + 1 if x.writable else 0
    return (library.Allocation * len(found))(*found), traces
