"""A round whose clients come one by one: one call looks at a client, one adds it, and one makes the averages."""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..schedule import SHORT
from ..sketch import SKETCH_SIZE
from ..tolerances import CONVERGED
from ..torch_backend.exact import ExactProducts
from ..torch_backend.procrustes import rotations
from ..types import Estimates
from .call import DTYPES, floats, no_estimates, projections, readable_references
from .library import INSTRUCTION_SETS, Problem, load
from .library import Stream as Structure
from .tensors import TensorTable

_ADD, _CLOSE = 1, 2  # fedrot::Task
_OTHERS = {**DTYPES, torch.float64: 3}

Factors = Callable[[int], tuple[Tensor, Tensor]]
"""An adapter's index → a client's A (r, d_in) and B (d_out, r)."""


@dataclass(frozen=True)
class ClientTensors:
    """The tensors of every client of a stream.

    Attributes:
        shapes: per adapter r, d_in and d_out.
        dtypes: per adapter.
        others: per other tensor its number of entries and its dtype.
        places: where A and B of every adapter in turn, and then the others, are among a client's tensors.
    """

    shapes: Sequence[tuple[int, int, int]]
    dtypes: Sequence[torch.dtype]
    others: Sequence[tuple[int, torch.dtype]]
    places: Sequence[int]


class Stream:
    """The memory of a stream, whose addresses the library is given once.

    Args:
        members: the clients' tensors; adapters are of a dtype and a rank that the library takes.
        sums: those of A and B of every adapter in turn, then of the others: contiguous, on a CPU, float32, and float64 for
            float64.
        undetermined, directions: per adapter, counted up with every client: ``Rotations.undetermined``, and all directions.
        instructions: the instruction set, at most what the machine has; by default that.

    Attributes:
        angles: the rotation angles of the client that was added last, per adapter, in degrees.
        dead: whether a row of A and the column of B that it meets are zero in what ``close`` returned, per adapter.
        residual: of the client that was looked at last, per adapter; see ``Rotations``.
        is_finite: whether that client, or what ``close`` returned, holds neither NaN nor Inf.
    """

    def __init__(
        self,
        members: ClientTensors,
        sums: Sequence[Tensor],
        undetermined: "array[int]",
        directions: "array[int]",
        instructions: str | None = None,
    ):
        library = load()
        assert library is not None
        self._library, self._level = library, library.fedrot_level()
        if instructions is not None:
            self._level = INSTRUCTION_SETS.index(instructions)
        self._members = members
        L, n = len(members.shapes), len(members.others)
        self.angles, self.residual = array("d", bytes(8 * L)), floats(L)
        self._finite, self._all_finite = array("B", bytes(L + n)), array("B", b"\1" * (L + n))
        self.dead = array("B", bytes(L))
        self._undetermined, self._doubtful = array("q", bytes(8 * L)), array("B", bytes(L))
        self._kept: list[object] = [sums, undetermined, directions]
        self._refs: tuple[Sequence[Tensor] | None, Sequence[Tensor] | None] = None, None
        clients = self._table("Q", [0] * (2 * L + n))
        problem = Problem(
            adapters=L,
            clients=1,
            n_steps=len(SHORT),
            converged=CONVERGED[torch.float32],
            shapes=self._table("q", [size for shape in members.shapes for size in shape]),
            dtypes=self._table("i", [DTYPES[dtype] for dtype in members.dtypes]),
            A=clients,
            B=clients + 8 * (L + n),
            steps=self._table("f", [c for step in SHORT for c in step]),
            residual=self.residual.data_ptr(),
            undetermined=_address(self._undetermined),
            doubtful=_address(self._doubtful),
            angles=_address(self.angles),
        )
        self._stream = Structure(
            problem=problem,
            others=n,
            sides=1,
            places=self._table("q", members.places),
            numels=self._table("q", [count for count, _ in members.others]),
            kinds=self._table("i", [_OTHERS[dtype] for _, dtype in members.others]),
            sums=self._table("Q", [x.data_ptr() for x in sums]),
            undetermined=_address(undetermined),
            directions=_address(directions),
            finite=_address(self._finite),
            dead=_address(self.dead),
        )
        self._pointer = ctypes.byref(self._stream)

    @property
    def is_finite(self) -> bool:
        """See the class."""
        return self._finite == self._all_finite

    @torch.no_grad()
    def rotate_towards(
        self, A_ref: Sequence[Tensor] | None, B_ref: Sequence[Tensor] | None, *, strength: float, reflections: bool
    ) -> None:
        """Have every client rotated towards references, which must stay as they are: they are read for every client.

        Args:
            A_ref, B_ref: per adapter, on a CPU; None for a factor that does not count.
            strength, reflections: as in ``streams.find_rotations``.
        """
        self._refs, self._strength, self._reflections = (A_ref, B_ref), strength, reflections
        squares = list(accumulate((r * r for r, _, _ in self._members.shapes), initial=0))
        self._R = floats(squares[-1])
        p, here = self._stream.problem, self._R.data_ptr()
        p.strength, p.reflections, p.R = strength, reflections, self._table("Q", [here + 4 * i for i in squares[:-1]])
        found = readable_references(A_ref, B_ref)
        self._kept.append(found)
        for name, table in found.tables.items():
            setattr(p, name, table.buffer_info()[0])
        if found.dtypes is not None:
            p.ref_dtypes = self._table("i", found.dtypes)

    def sketch(self, sums: Sequence[Tensor], seed: int) -> None:
        """Have every client's factors sketched.

        Args:
            sums: for adapters in a row that are of one rank (G, S, 64 r + 1024) float64, contiguous: the sums of sketches of
                the rotated factors, and then of the factors as they came, or S = 1 where clients are not rotated. They are
                the means of BᵀΨ (r, 32) and of AΩ (r, 32), and ΨᵀEΩ (32, 32).
            seed: of the projections.
        """
        shapes = self._members.shapes
        tables = projections(seed, tuple((d_in, d_out) for _, d_in, d_out in shapes))
        sizes = list(accumulate((2 * SKETCH_SIZE * r for r, _, _ in shapes), initial=0))
        one, p, s = floats(sizes[-1]), self._stream.problem, self._stream
        self._kept += (tables, one, sums)
        p.shifts, p.signs = _address(tables.shifts), _address(tables.signs)
        p.sketches = self._table("Q", [one.data_ptr() + 4 * i for i in sizes[:-1]])
        s.sides = sums[0].shape[1]
        addresses = []
        for x in sums:
            assert x.is_contiguous() and x.dtype == torch.float64 and x.shape[1] == s.sides
            size, here = 8 * x.shape[2], x.data_ptr()
            addresses += [here + size * (g * s.sides + side) for g in range(len(x)) for side in (0, s.sides - 1)]
        assert len(addresses) == 2 * len(shapes)
        s.sketches = self._table("Q", addresses)

    def look(self, client: TensorTable, factors: Factors) -> bool:
        """Find a client's rotations and sketches. The sums stay as they are.

        Args:
            client: the client's tensors, which stay as they are until it is added.
            factors: its factors, for rotations that float32 does not find.

        Returns:
            Whether all tensors are what the stream is of; if not, none of them was read.
        """
        self._stream.problem.threads = torch.get_num_threads()
        where = client.addresses.buffer_info()[0]
        if self._library.fedrot_stream_look(self._pointer, where, client.kinds, len(client), self._level):
            return False
        if 1 in self._doubtful and self.is_finite:
            self._rotate_carefully(factors)
        return True

    def add(self, weight: float, share: float) -> None:
        """Add the client that was looked at last.

        Args:
            weight: the factor of its tensors in the sums.
            share: its part of the weights of all clients so far.
        """
        self._stream.weight, self._stream.share = weight, share
        self._library.fedrot_stream(self._pointer, _ADD, self._level)

    def close(self, total: float, out: Sequence[Tensor]) -> Estimates | None:
        """Make the averages, which the sums do not survive.

        Args:
            total: the sum of the weights.
            out: the averages, contiguous: as many as there are sums, in the clients' dtypes; may be the sums themselves.

        Returns:
            The estimates of the errors, if clients were sketched.
        """
        s, L, estimates = self._stream, len(self._members.shapes), None
        if s.sketches:
            estimates = no_estimates(L)
            s.numbers, s.problem.squares = (x.data_ptr() for x in estimates)
        s.total, s.out = total, self._table("Q", [x.data_ptr() for x in out])
        s.problem.threads = torch.get_num_threads()
        self._library.fedrot_stream(self._pointer, _CLOSE, self._level)
        return estimates

    @torch.no_grad()
    def _rotate_carefully(self, factors: Factors) -> None:
        at = 0
        for i, ((r, _, _), is_doubtful) in enumerate(zip(self._members.shapes, self._doubtful, strict=True)):
            if is_doubtful:
                A, B = factors(i)
                A_ref, B_ref = (None if refs is None else [refs[i]] for refs in self._refs)
                exact = ExactProducts([[A]], [[B]], A_ref, B_ref)
                M, floor = exact(0, 0)[None], exact.floors[0]
                found = rotations(M, strength=self._strength, reflections=self._reflections, floor=floor)
                self._R[at : at + r * r] = found.R.flatten()
                self.residual[i], self._undetermined[i] = found.residual[0], int(found.undetermined)
            at += r * r

    def _table(self, kind: str, values: Sequence[float]) -> int:
        """The address of an array of these values."""
        table = array(kind, values)
        self._kept.append(table)
        return _address(table)


def _address(table: "array[int] | array[float]") -> int:
    return table.buffer_info()[0]
