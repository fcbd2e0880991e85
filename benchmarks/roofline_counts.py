"""The kernels of one aggregation, executed on a CPU and counted, and the time that each resource of a card takes for it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

import fedrot_kernels as fk
from tests.kernels.executor import Counts, Launch, Settings, executed
from tests.kernels.executor.ptx import Statement

from .cards import CARDS, MULTIPLY_ADDS, SHARED_BYTES, SPECIAL_LANES, WARP_INSTRUCTIONS, Card
from .roofline_sass import compile_ptx
from .workloads import Adapter, Workload, build

_SECTOR = 32  # bytes
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.")
_MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(\w+)\.")
_SHUFFLES = ("shfl", "redux", "movmatrix")


@dataclass(frozen=True)
class Case:
    """One aggregation that is counted: L adapters of width d on both sides, aligned on A, at λ = 0.5."""

    dtype: torch.dtype
    rank: int
    d: int
    clients: int
    adapters: int

    @property
    def workload(self) -> Workload:
        return _workload(self, self.adapters)


@dataclass(frozen=True)
class Counted:
    """One kernel of one aggregation.

    Attributes:
        kernel: its name.
        ctas: of the whole launch.
        warps: of a CTA.
        registers: of a thread.
        stack: bytes of a thread.
        shared: bytes of a CTA.
        per_cta: the work of one CTA on average: bytes of "memory" and "L2", and clocks of an SM of everything else.
        bank_conflicts: passes over shared memory over what they would be without conflicts.
        barriers: of one CTA.
    """

    kernel: str
    ctas: int
    warps: int
    registers: int
    stack: int
    shared: int
    per_cta: Mapping[str, float]
    bank_conflicts: float
    barriers: float

    def times(self, card: Card) -> dict[str, float]:
        """Seconds that each resource of a card is busy, if the CTAs are spread evenly."""
        total = {name: self.ctas * work for name, work in self.per_cta.items()}
        clocks = card.multiprocessors * card.clock
        return {name: work / {"memory": card.memory, "L2": card.l2}.get(name, clocks) for name, work in total.items()}

    def one_warp(self, card: Card) -> float:
        """Seconds of one warp after the other: it issues one instruction a clock at best, however idle its SM is."""
        resident = card.resident(self.registers, self.warps, self.shared)
        rounds = -(-self.ctas // (card.multiprocessors * resident))
        return rounds * self.per_cta["issue"] * WARP_INSTRUCTIONS / self.warps / card.clock


def count(case: Case) -> list[Counted]:
    """Execute a few adapters of a case, and scale to all by the number of programs.

    Raises:
        RuntimeError: twice the adapters are not twice the instructions, in a kernel whose work depends on no data.
    """
    few = -(-16 // case.rank)  # polar factors of small ranks share a program
    once, twice = (_execute(case, n) for n in (few, 2 * few))
    for (launch, counts), (_, more) in zip(once, twice, strict=True):
        same = 2 * sum(counts.issued) == sum(more.issued) and 2 * sum(counts.wavefronts) == sum(more.wavefronts)
        if not same and not launch.name.startswith("polar"):
            raise RuntimeError(f"{launch.name}, {case}: programs differ in what they do, so that few do not stand for all")
    return [counted(launch, counts, _programs(launch, case, 2 * few), case.adapters / (2 * few)) for launch, counts in twice]


def _workload(case: Case, adapters: int) -> Workload:
    return Workload("square", tuple(Adapter(f"layer{i}", case.d, case.d) for i in range(adapters)), case.rank, case.clients)


def _execute(case: Case, adapters: int) -> list[tuple[Launch, Counts]]:
    inputs = build(_workload(case, adapters), torch.device("cpu"), case.dtype)
    A, B = inputs.stacked_factors
    with executed(90, Settings(counting=True)) as device:
        fk.align_average(A, B, torch.tensor(inputs.weights), A_ref=inputs.reference_A, strength=0.5, backend="triton")
    return device.launches


def _programs(launch: Launch, case: Case, adapters: int) -> int:
    """CTAs of a case's launch, by those of one of fewer adapters."""
    if launch.name == "polar_blocked_kernel":  # a CTA takes one matrix after the other
        return min(case.adapters * case.clients, min(card.multiprocessors for card in CARDS.values()))
    x, y, z = launch.grid
    return round(x * y * z * case.adapters / adapters)


def counted(launch: Launch, counts: Counts, ctas: int, scale: float = 1.0) -> Counted:
    """What a launch did, as a launch of ``ctas`` programs that does ``scale`` times as much."""
    statements = launch.program.kernel.statements
    compiled = compile_ptx(launch.program.kernel)
    issued = sum(n * m for n, m in zip(counts.issued, compiled.instructions, strict=True))
    special = sum(n * m for n, m in zip(counts.issued, compiled.special, strict=True))
    parts = [
        _passes(s, n, sectors, wavefronts)
        for s, n, sectors, wavefronts in zip(statements, counts.issued, counts.sectors, counts.wavefronts, strict=True)
    ]
    stored = sum(n for s, n in zip(statements, counts.sectors, strict=True) if s.name.startswith("st.global"))
    work = {
        "memory": counts.sectors_of_launch * _SECTOR,
        "L2": max(counts.sectors_by_cta, stored) * _SECTOR,  # the L1 cache may serve what is read again, but writes through
        "issue": issued / WARP_INSTRUCTIONS,
        "shared memory": sum(passes for passes, _ in parts),
        "tensor cores": sum(clocks for _, clocks in parts),
        "special functions": special * 32 / SPECIAL_LANES,
    }
    barriers = sum(n for s, n in zip(statements, counts.issued, strict=True) if s.name.startswith("bar.sync"))
    return Counted(
        launch.name.removesuffix("_kernel"),
        ctas,
        launch.program.kernel.warps,
        compiled.registers,
        compiled.stack,
        launch.shared_bytes,
        {name: amount * scale / ctas for name, amount in work.items()},
        sum(counts.wavefronts) / max(1, sum(counts.ideal)),
        barriers / launch.program.kernel.warps * scale / ctas,
    )


def _passes(s: Statement, issued: int, sectors: int, wavefronts: int) -> tuple[float, float]:
    """Clocks of shared memory and of the tensor cores. Requests of global memory and shuffles count as shared memory."""
    if found := _WGMMA.match(s.name):  # of four warps
        n, k, kind = int(found[1]), int(found[2]), found[3]
        rows = n + (0 if s.operands[1].startswith("{") else 64)  # the left factor may be in registers
        size = 4 if kind == "tf32" else 2
        return issued / 4 * rows * k * size / SHARED_BYTES, issued / 4 * 64 * n * k / MULTIPLY_ADDS[kind]
    if found := _MMA.match(s.name):
        return 0.0, issued * 16 * 8 * int(found[1]) / MULTIPLY_ADDS[found[2]]
    if s.name.startswith(("ld.global", "st.global")):
        return max(issued, sectors * _SECTOR / SHARED_BYTES), 0.0
    return issued if s.name.startswith(_SHUFFLES) else wavefronts, 0.0
