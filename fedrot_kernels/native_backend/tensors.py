"""Tensors read by the compiled library, many at a time: where they lie, and whether they are alike, finite or zero."""

import ctypes
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from torch import Tensor
from torch.nn import Parameter

from .library import INSTRUCTION_SETS, load

_KIND = 40  # bytes of fedrot::Kind
_ALIKE, _PLAIN, _FLOATING, _FLOAT32 = 1, 2, 4, 8


class TensorTable:
    """Tensors as the library sees them.

    Args:
        tensors: the tensors, which are kept alive.
        addresses: where each lies.
        kinds: dtype, shape, device and contiguity of each, as bytes that can be compared.
    """

    __slots__ = ("addresses", "kinds", "tensors")

    def __init__(self, tensors: Sequence[Tensor], addresses: "array[int]", kinds: bytes):
        self.tensors, self.addresses, self.kinds = tensors, addresses, kinds

    def __len__(self) -> int:
        return len(self.addresses)

    def describe(self, n: int) -> tuple[bool, bool]:
        """Describe tensors in runs of n; see ``describe``."""
        return describe(self.kinds, len(self) // n, n)

    def choose_kinds(self, places: Iterable[int]) -> bytes:
        """The kinds of the tensors at these places."""
        return b"".join([self.kinds[_KIND * place : _KIND * (place + 1)] for place in places])

    def is_float32(self) -> bool:
        """Whether all are contiguous, on a CPU, and float32."""
        library = load()
        assert library is not None
        found: int = library.fedrot_describe(self.kinds, 1, len(self))
        return found & _PLAIN != 0 and found & _FLOAT32 != 0

    def is_finite(self, instructions: str | None = None) -> bool:
        """Whether tensors that are contiguous, on a CPU and floating-point hold no NaN and no Inf.

        Args:
            instructions: the instruction set, at most what the machine has; by default that.
        """
        library = load()
        assert library is not None
        level = library.fedrot_level() if instructions is None else INSTRUCTION_SETS.index(instructions)
        return bool(library.fedrot_finite(self.addresses.buffer_info()[0], self.kinds, len(self), level))

    def find_zeros(self) -> list[int]:
        """The places of the tensors that are zero in every entry; they are contiguous, on a CPU and floating-point."""
        library, zero = load(), bytearray(len(self))
        assert library is not None
        into = (ctypes.c_uint8 * len(self)).from_buffer(zero)
        library.fedrot_zero(self.addresses.buffer_info()[0], self.kinds, len(self), into)
        return [i for i, is_zero in enumerate(zero) if is_zero]


def describe(kinds: bytes, runs: int, n: int) -> tuple[bool, bool]:
    """Describe the kinds of tensors in runs of n.

    Returns:
        Whether in each run all are of one kind; and whether all are contiguous, on a CPU, and floating-point.
    """
    library = load()
    assert library is not None
    found = library.fedrot_describe(kinds, runs, n)
    return bool(found & _ALIKE), found & _PLAIN != 0 and found & _FLOATING != 0


def read_tensors(tensors: Sequence[Tensor]) -> TensorTable | None:
    """Read tensors; None where the library is not there, or one of them is no plain tensor.

    PyTorch exports them by the table of functions that DLPack specifies: a fraction of the time of their attributes.
    """
    if (exchange := _exchange()) is None or not {*map(type, tensors)} <= _PLAIN_TYPES:
        return None
    if any(map(Tensor.is_neg, tensors)):  # views whose sign is a flag, which DLPack does not export
        return None
    n = len(tensors)
    addresses, kinds = array("Q", bytes(8 * n)), ctypes.create_string_buffer(_KIND * n)
    objects = struct.pack(f"{n}Q", *map(id, tensors))
    try:
        if _reader()(exchange, objects, n, addresses.buffer_info()[0], kinds) < n:
            return None
    except (RuntimeError, BufferError):  # tensors without storage, such as sparse ones
        return None
    return TensorTable(tensors, addresses, kinds.raw)


_PLAIN_TYPES = {Tensor, Parameter}


@cache
def _exchange() -> int | None:
    """The address of PyTorch's table of functions; None if the library or the table is not there."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or load() is None:
        return None
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    address: int | None = prototype(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")
    return address


@cache
def _reader() -> Callable[..., int]:
    """``fedrot_read``, called with the interpreter's lock held."""
    library, pointer = load(), ctypes.c_void_p
    assert library is not None
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int64, pointer, ctypes.c_char_p, ctypes.c_int64, pointer, pointer)
    return prototype(("fedrot_read", library))
