"""Executing one launch, with what it counts and the faults it may show."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from . import library
from .encoding import Program
from .memory import Extent, allocations

TensorCores = Literal["rounding", "truncating"]


class Fault(Exception):
    """Something that a program must not do.

    Attributes:
        kind: such as "out of bounds" or "race".
    """

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclass(frozen=True)
class Settings:
    """How to execute.

    Attributes:
        tensor_cores: how products are added: exactly and then rounded once, or cut off; see ``core/matrix.inc``.
        reverse: whether CTAs, and the warps of one, take their turns in reverse order.
        counting: whether sectors and wavefronts are counted, which takes time; instructions always are.
    """

    tensor_cores: TensorCores = "rounding"
    reverse: bool = False
    counting: bool = False


DEFAULT = Settings()


class Counts:
    """What one launch did, per statement of its program where nothing else is said.

    Attributes:
        issued: how many warp instructions of a statement were issued.
        lanes: how many lanes took part in them.
        sectors: 32-byte sectors of global memory, distinct within each request.
        wavefronts: passes over shared memory.
        ideal: what the passes would be without bank conflicts.
        sectors_by_cta: sectors distinct within a CTA, summed over CTAs.
        sectors_of_launch: sectors distinct within the launch.
    """

    def __init__(self, counters: Sequence[library.Counters], totals: Sequence[int]):
        self._counters = counters
        self.sectors_by_cta, self.sectors_of_launch = totals

    def __getattr__(self, name: str) -> list[int]:
        if name not in library.COUNTERS:
            raise AttributeError(name)
        return [getattr(x, name) for x in self._counters]


@dataclass(frozen=True)
class Launch:
    """A program and all that it was launched on, so that it can be executed again while its memory lives.

    Attributes:
        name: the kernel's.
        program: what is executed.
        grid: CTAs along each axis.
        parameters: the kernel's parameters as they lie in memory.
        extents: the global memory that it may access.
        shared_bytes: shared memory of a CTA.
        arch: 80 or 90, whose tensor cores add 16 or 32 bytes of a row at once.
        tensors: the arguments, kept alive.
    """

    name: str
    program: Program
    grid: tuple[int, int, int]
    parameters: bytes
    extents: tuple[Extent, ...]
    shared_bytes: int
    arch: int
    tensors: tuple[Tensor, ...]

    def execute(self, settings: Settings = DEFAULT) -> Counts:
        """Execute it on the memory of this process.

        Raises:
            Fault: the program did what it must not; its stores before that have happened.
        """
        program = self.program
        code = (library.Instruction * len(program.code))(*program.code)
        operands = (ctypes.c_uint32 * len(program.operands))(*program.operands)
        constants = ctypes.create_string_buffer(program.constants, len(program.constants))
        parameters = ctypes.create_string_buffer(self.parameters, len(self.parameters))
        memory, n_traces = allocations(self.extents)
        counters = (library.Counters * len(code))()
        totals = (ctypes.c_uint64 * 2)()
        truncating = {80: 16, 90: 32}[self.arch] if settings.tensor_cores == "truncating" else 0
        at = ctypes.addressof
        native = library.Program(
            at(code), at(operands), at(constants), len(code), program.slots, program.kernel.warps, self.shared_bytes,
            program.shared_granule, program.asynchronous,
        )  # fmt: skip
        launch = library.Launch(
            at(parameters), at(memory), at(counters), at(totals), len(memory), n_traces, (ctypes.c_int32 * 3)(*self.grid),
            settings.reverse, truncating, settings.counting,
        )  # fmt: skip
        report = library.Report()
        if library.core().fedrot_execute(native, launch, report):
            raise _fault(program, report)
        return Counts(counters, totals)


def _fault(program: Program, report: library.Report) -> Fault:
    statement = program.kernel.statements[report.instruction]
    who = f"CTA {report.cta}, warp {report.warp}" + (f", lane {report.lane}" if report.lane >= 0 else "")
    text = program.kernel.text.splitlines()[statement.line - 1].strip()
    where = f"{who}; {statement.source}; PTX line {statement.line}: {text}"
    return Fault(report.kind.decode(), f"{report.detail.decode()} ({where})")
