"""Calls of the compiled library: one structure of numbers and addresses, whose memory is kept until the call is over."""

import ctypes
import math
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import count_clients, firsts
from ..schedule import SHORT
from ..sketch import SKETCH_SIZE, Projection, projection
from ..tolerances import CONVERGED
from ..types import Estimates, Factors
from .columns import TensorColumns
from .library import INSTRUCTION_SETS, Careful, Problem, load
from .tensors import TensorTable, read_tensors

# The fields that are not float32, or in the factors' dtype.
_OF_DTYPE = {"undetermined": torch.int64}
_OF_DTYPE |= dict.fromkeys(("estimates", "squares", "errors", "angles", "products", "sizes"), torch.float64)
_OF_DTYPE |= dict.fromkeys(("doubtful", "finite", "shifts", "unsure"), torch.uint8)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def floats(*shape: int) -> Tensor:
    """Memory for the library's float32 values, all 0.

    Not by ``torch.zeros``: PyTorch would fill it in several threads, which then wait for more on the library's cores.
    """
    return torch.frombuffer(bytearray(4 * math.prod(shape)), dtype=torch.float32).view(shape)


def no_estimates(L: int) -> Estimates:
    """Memory for the estimates of L adapters."""
    numbers, squares = (torch.zeros(n, dtype=torch.float64, device="cpu") for n in (7 * L, SKETCH_SIZE**2))
    return Estimates(numbers.view(L, 7), squares.view(SKETCH_SIZE, SKETCH_SIZE))


class Projections(NamedTuple):
    """The addresses of the shifts and of the signs of the projections of A and B, per adapter two, and what lies there."""

    shifts: "array[int]"
    signs: "array[int]"
    kept: list[Projection]  # or the addresses would not be those of anything


@lru_cache(maxsize=8)
def projections(seed: int, widths: tuple[tuple[int, int], ...]) -> Projections:
    """The projections of a seed for adapters of these d_in and d_out."""
    pairs = [(projection(seed, "A", d_in), projection(seed, "B", d_out)) for d_in, d_out in widths]
    shifts = [x.shifts for pair in pairs for x in pair]
    signs = [x for on_A, on_B in pairs for x in (on_A.buckets, on_B.quads)]
    assert is_writable(shifts, torch.uint8) and is_writable(signs, torch.float32)
    tables = [array("Q", [x.data_ptr() for x in tensors]) for tensors in (shifts, signs)]
    return Projections(tables[0], tables[1], [x for pair in pairs for x in pair])


def is_writable(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> bool:
    """Whether the library can take them as they are: contiguous, on a CPU, and of the dtype, if one is named."""
    if dtype in (None, torch.float32) and (table := read_tensors(tensors)) is not None:
        return _is_fit(table, dtype)
    return all(x.dtype == (dtype or x.dtype) and x.is_contiguous() and x.device.type == "cpu" for x in tensors)


def _is_fit(table: TensorTable, dtype: torch.dtype | None) -> bool:
    return table.is_float32() if dtype else table.describe(1)[1]


class References(NamedTuple):
    """Adapters' references as the library reads them.

    Attributes:
        kept: what must be kept for as long as the library reads.
        tables: the addresses, by the names of the fields.
        dtypes: per adapter; None for float32.
    """

    kept: list[Sequence[Tensor]]
    tables: dict[str, "array[int]"]
    dtypes: list[int] | None


def readable_references(A: Sequence[Tensor] | None, B: Sequence[Tensor] | None) -> References:
    """The references that are given; copies in float32 of those that the library cannot read."""
    given = {name: refs for name, refs in (("A_ref", A), ("B_ref", B)) if refs is not None}
    tables = {name: read_tensors(refs) for name, refs in given.items()}
    found = {name: table.addresses for name, table in tables.items() if table is not None and _is_fit(table, None)}
    if len(found) == len(given):
        dtypes = [[x.dtype for x in refs] for refs in given.values()]
        if {*dtypes[0], *dtypes[-1]} == {torch.float32}:
            return References([*given.values()], found, None)
        if dtypes[0] == dtypes[-1] and DTYPES.keys() >= {*dtypes[0]}:
            return References([*given.values()], found, [DTYPES[dtype] for dtype in dtypes[0]])
    kept: list[Sequence[Tensor]] = [
        [x.detach().resolve_neg().to("cpu", torch.float32).contiguous() for x in refs] for refs in given.values()
    ]
    return References(kept, {name: _addresses(refs) for name, refs in zip(given, kept, strict=True)}, None)


def _addresses(tensors: Sequence[Tensor]) -> "array[int]":
    """Where tensors with entries lie; ValueError if one lies nowhere."""
    found = array("Q", [x.data_ptr() for x in tensors])
    if 0 in found:
        raise ValueError(f"a factor {tuple(tensors[found.index(0)].shape)} has no memory: it was freed, as FSDP does")
    return found


class Call:
    """A call for the adapters of N clients.

    Args:
        A, B: per adapter the clients' factors, checked: on a CPU, in a dtype that the library takes.
        instructions: the instruction set; by default the best that the machine has.

    Attributes:
        first_A, first_B: the first client's factors.
        ranks: per adapter.
    """

    def __init__(self, A: Factors, B: Factors, instructions: str | None = None):
        self._kept: list[object] = []
        library = load()
        assert library is not None
        self._library, self._level = library, library.fedrot_level()
        if instructions is not None:
            self._level = INSTRUCTION_SETS.index(instructions)
        self.first_A, self.first_B = firsts(A), firsts(B)
        dimensions = [(*a.shape, b.shape[0]) for a, b in zip(self.first_A, self.first_B, strict=True)]
        self.ranks = [r for r, _, _ in dimensions]
        self._fields: dict[str, Any] = {
            "adapters": len(A),
            "clients": count_clients(A),
            "threads": torch.get_num_threads(),
            "n_steps": len(SHORT),
            "strength": 1.0,
            "converged": CONVERGED[torch.float32],
            "shapes": self._table("q", [size for sizes in dimensions for size in sizes]),
            "dtypes": self._table("i", [DTYPES[a.dtype] for a in self.first_A]),
            "A": self._addresses_of(A),
            "B": self._addresses_of(B),
            "steps": self._table("f", [c for step in SHORT for c in step]),
        }

    def set(self, **fields: float | Tensor | Sequence[Tensor] | None) -> None:
        """Set fields of the structure: numbers, tensors by their address, lists of tensors by that of a table of them."""
        for name, value in fields.items():
            dtype = _OF_DTYPE.get(name, torch.float32)
            if isinstance(value, Tensor):
                assert value.dtype == dtype and value.is_contiguous() and value.device.type == "cpu", name
                self._kept.append(value)
                self._fields[name] = value.data_ptr()
            elif isinstance(value, Sequence):
                any_dtype = name in ("A_out", "B_out") and "adds" not in fields
                self._fields[name] = self._written(value, None if any_dtype else dtype)
            elif value is not None:
                self._fields[name] = value

    def refer_to(self, A: Sequence[Tensor] | None, B: Sequence[Tensor] | None) -> None:
        """Set the references. Those that the library cannot read are copied as float32."""
        found = readable_references(A, B)
        if found.dtypes is not None:
            self._fields["ref_dtypes"] = self._table("i", found.dtypes)
        self._kept.append(found)
        self._fields |= {name: table.buffer_info()[0] for name, table in found.tables.items()}

    def sketch(self, seed: int) -> None:
        """Have every client's factors sketched, by the projections of a seed."""
        widths = tuple((a.shape[1], b.shape[0]) for a, b in zip(self.first_A, self.first_B, strict=True))
        tables = projections(seed, widths)
        self._kept.append(tables)
        self._fields |= {"shifts": tables.shifts.buffer_info()[0], "signs": tables.signs.buffer_info()[0]}

    def run(self, careful: Callable[[int], None] | None = None) -> None:
        """Make the call.

        Args:
            careful: finds the rotations of an adapter that the library is not sure of.
        """
        failures: list[BaseException] = []
        inference = torch.is_inference_mode_enabled()  # of this thread; others that call back must be in the same mode

        @torch.inference_mode(inference)
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
        return self._keep(array(kind, values))

    def _keep(self, table: "array[Any]") -> int:
        """The address of an array, which is kept."""
        self._kept.append(table)
        return table.buffer_info()[0]

    def _addresses_of(self, factors: Factors) -> int:
        """The address of a table of the factors' addresses; factors that are not contiguous are copied."""
        if isinstance(factors, TensorColumns) and factors.are_plain():
            self._kept.append(factors)
            return self._keep(factors.addresses())
        tensors = [x for clients in factors for x in clients]
        table = read_tensors(tensors)
        if table is not None and table.describe(1)[1]:
            self._kept.append(table)
            return self._keep(table.addresses)
        contiguous = [x.resolve_neg().contiguous() for x in tensors]
        self._kept.append(contiguous)
        return self._keep(_addresses(contiguous))

    def _written(self, tensors: Sequence[Tensor], dtype: torch.dtype | None) -> int:
        """The address of a table of the addresses of tensors that the library writes to, and not to copies."""
        table = read_tensors(tensors)
        assert (table is not None and _is_fit(table, dtype)) or (table is None and is_writable(tensors, dtype))
        self._kept.append(tensors)
        return self._keep(array("Q", [x.data_ptr() for x in tensors]) if table is None else table.addresses)
