"""Calls of the compiled library: one structure of numbers and addresses, whose memory is kept until the call is over."""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..schedule import SHORT
from ..sketch import projection
from ..tolerances import CONVERGED
from ..types import Clients
from .library import INSTRUCTION_SETS, Careful, Problem, load
from .tensors import read_tensors

# The fields that are not float32, or in the factors' dtype.
_OF_DTYPE = {"estimates": torch.float64, "undetermined": torch.int64} | dict.fromkeys(
    ("doubtful", "finite", "shifts"), torch.uint8
)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def floats(*shape: int) -> Tensor:
    """Memory for the library's float32 values, whatever PyTorch's default dtype and device are."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


class Call:
    """A call for the adapters of N clients.

    Args:
        A, B: per adapter the clients' factors, checked: on a CPU, in a dtype that the library takes.
        instructions: the instruction set; by default the best that the machine has.

    Attributes:
        first_A, first_B: the first client's factors.
        ranks: per adapter.
    """

    def __init__(self, A: Sequence[Clients], B: Sequence[Clients], instructions: str | None = None):
        self._kept: list[object] = []
        library = load()
        assert library is not None
        self._library, self._level = library, library.fedrot_level()
        if instructions is not None:
            self._level = INSTRUCTION_SETS.index(instructions)
        self.first_A, self.first_B = ([clients[0] for clients in of_factor] for of_factor in (A, B))
        self.ranks = [a.shape[0] for a in self.first_A]
        shapes = [size for a, b in zip(self.first_A, self.first_B, strict=True) for size in (*a.shape, b.shape[0])]
        self._fields: dict[str, Any] = {
            "adapters": len(A),
            "clients": len(A[0]),
            "threads": torch.get_num_threads(),
            "n_steps": len(SHORT),
            "strength": 1.0,
            "converged": CONVERGED[torch.float32],
            "shapes": self._table("q", shapes),
            "dtypes": self._table("i", [_DTYPES[a.dtype] for a in self.first_A]),
            "A": self._addresses([x for clients in A for x in clients]),
            "B": self._addresses([x for clients in B for x in clients]),
            "steps": self._table("f", [c for step in SHORT for c in step]),
        }

    def set(self, **fields: float | Tensor | Sequence[Tensor] | None) -> None:
        """Set fields of the structure: numbers, tensors by their address, lists of tensors by that of a table of them."""
        for name, value in fields.items():
            tensors = [value] if isinstance(value, Tensor) else value if isinstance(value, Sequence) else []
            dtype = _OF_DTYPE.get(name, torch.float32)
            if name not in ("A_out", "B_out") or "adds" in fields:
                assert all(x.dtype == dtype for x in tensors), name
            if name not in ("A_ref", "B_ref"):  # the library may write to it, and not to a copy
                assert all(x.is_contiguous() and x.device.type == "cpu" for x in tensors), name
            if isinstance(value, Tensor):
                self._kept.append(value)
                self._fields[name] = value.data_ptr()
            elif isinstance(value, Sequence):
                self._fields[name] = self._addresses(value)
            elif value is not None:
                self._fields[name] = value

    def sketch(self, seed: int) -> None:
        """Have every client's factors sketched, by the projections of a seed."""
        pairs = zip(self.first_A, self.first_B, strict=True)
        found = [(projection(seed, "A", a.shape[1]), projection(seed, "B", b.shape[0])) for a, b in pairs]
        self.set(
            shifts=[x.shifts for pair in found for x in pair],
            signs=[x for on_A, on_B in found for x in (on_A.buckets, on_B.quads)],
        )

    def run(self, careful: Callable[[int], None] | None = None) -> None:
        """Make the call.

        Args:
            careful: finds the rotations of an adapter that the library is not sure of.
        """
        failures: list[BaseException] = []

        @torch.no_grad()
        def guarded(adapter: int) -> int:
            try:
                assert careful is not None
                careful(adapter)
            except BaseException as error:  # raised again below: it cannot pass through C++
                failures.append(error)
                return 1
            return 0

        problem = Problem(**self._fields, careful=Careful(guarded))
        if self._library.fedrot_align_average(ctypes.byref(problem), self._level):
            raise failures[0]

    def _table(self, kind: str, values: Sequence[float]) -> int:
        """The address of an array of these values."""
        table = array(kind, values)
        self._kept.append(table)
        return table.buffer_info()[0]

    def _addresses(self, tensors: Sequence[Tensor]) -> int:
        """The address of a table of the tensors' addresses; tensors that are not contiguous are copied."""
        table = read_tensors(tensors)
        if table is not None and table.describe(1)[1]:
            self._kept += (tensors, table)
            return table.addresses.buffer_info()[0]
        contiguous = [x.resolve_neg().contiguous() for x in tensors]
        self._kept.append(contiguous)
        return self._table("Q", [x.data_ptr() for x in contiguous])
