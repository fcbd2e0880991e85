"""Where registers are kept: values that are never needed at once share a place, so that a warp's registers fit the cache."""

import heapq
from collections.abc import Iterable, Sequence
from itertools import pairwise

from .ptx import Kernel, inputs, register_size, results

Block = tuple[int, int, list[int]]  # where it begins and ends, and where the blocks begin that may come after
Accesses = tuple[list[str], list[str]]  # the registers that a statement reads, and those that it writes


def allocate(kernel: Kernel) -> tuple[dict[str, int], int]:
    """Find a place for every register.

    What one instruction reads and writes never shares a place, because an instruction writes lane by lane. A register that
    some lane may read before it has written it keeps its place from the start, where the core puts garbage.

    Returns:
        The first slot of every register, and how many slots there are. A slot holds 32 bits of each lane.
    """
    first, last = _intervals(kernel)
    free: dict[int, list[int]] = {1: [], 2: []}
    ends: list[tuple[int, int, int]] = []
    slots: dict[str, int] = {}
    total = 0
    for register in sorted(first, key=lambda x: first[x]):
        while ends and ends[0][0] < first[register]:
            _, width, slot = heapq.heappop(ends)
            heapq.heappush(free[width], slot)
        width = 2 if register_size(register) == 8 else 1
        if free[width]:
            slot = heapq.heappop(free[width])
        else:
            slot, total = total, total + width
        slots[register] = slot
        heapq.heappush(ends, (last[register], width, slot))
    return slots, total


def _intervals(kernel: Kernel) -> tuple[dict[str, int], dict[str, int]]:
    """The first and the last statement at which each register holds a value that counts."""
    blocks = _blocks(kernel)
    accesses = [(inputs(s), results(s)) for s in kernel.statements]
    live_in = _live_in(kernel, blocks, accesses)
    first: dict[str, int] = {}
    last: dict[str, int] = {}

    def extend(registers: Iterable[str], at: int) -> None:
        for name in registers:
            first.setdefault(name, at)
            last[name] = at

    for begin, end, after in blocks:
        extend(live_in[begin], begin)
        for at in range(begin, end):
            extend(accesses[at][0], at)
            extend(accesses[at][1], at)
        for x in after:
            extend(live_in[x], end - 1)
    waits = [at for at, s in enumerate(kernel.statements) if s.name.startswith("wgmma.wait_group")]
    for at, s in enumerate(kernel.statements):
        if s.name.startswith("wgmma.mma"):  # its registers are in use until it has been waited for
            wait = next((x for x in waits if x > at), len(kernel.statements))
            for name in accesses[at][0]:
                last[name] = max(last[name], wait)
    return first, last


def _blocks(kernel: Kernel) -> list[Block]:
    """Runs of statements without branches."""
    jumps = [i for i, s in enumerate(kernel.statements) if s.name.startswith(("bra", "ret"))]
    n = len(kernel.statements)
    leaders = sorted({0, n, *(i + 1 for i in jumps), *(at for at in kernel.labels.values() if at < n)})
    blocks = []
    for begin, end in pairwise(leaders):
        statement = kernel.statements[end - 1]
        after = []
        if statement.name.startswith("bra"):
            after.append(kernel.labels[statement.operands[0]])
        if end < n and (statement.guard or not statement.name.startswith(("bra", "ret"))):
            after.append(end)
        blocks.append((begin, end, after))
    return blocks


def _live_in(kernel: Kernel, blocks: Sequence[Block], accesses: Sequence[Accesses]) -> dict[int, set[str]]:
    """The registers whose values count where each block begins."""
    needed: dict[int, set[str]] = {}
    overwritten: dict[int, set[str]] = {}
    for begin, end, _ in blocks:
        used, kept = needed.setdefault(begin, set()), overwritten.setdefault(begin, set())
        for at in reversed(range(begin, end)):
            reads, writes = accesses[at]
            if not kernel.statements[at].guard:  # a guarded one leaves the old value in some lanes
                used.difference_update(writes)
                kept.update(writes)
            used.update(reads)
    live = {begin: set(used) for begin, used in needed.items()}
    changed = True
    while changed:
        changed = False
        for begin, _, after in reversed(blocks):
            before = len(live[begin])
            live[begin].update(*(live[x] - overwritten[begin] for x in after))
            changed |= len(live[begin]) > before
    return live
