"""From the PTX that was executed to the instructions that a card issues: how many there are of each PTX instruction."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from tests.kernels.executor.ptx import Kernel

_LINE = re.compile(r'//## File "kernel.ptx", line (\d+)')
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
# PTX that is one instruction of the card, so that more of them are copies: ptxas unrolls loops.
_ONE_FOR_ONE = {"fma": "FFMA", "shfl": "SHFL", "bar": "BAR", "mma": "HMMA", "ldmatrix": "LDSM"}
_SPECIAL = ("MUFU", "F2F", "F2I", "I2F", "FRND")


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of memory of a thread.
        sass: the card's code.
        instructions: of the card, for one of each PTX statement.
        special: those of them that go through the unit of 16 lanes for reciprocals, roots and single conversions.
    """

    registers: int
    stack: int
    sass: str
    instructions: Sequence[float]
    special: Sequence[float]


def compile_ptx(kernel: Kernel, arch: str = "sm_90a") -> Compiled:
    """Compile for a card, each PTX statement named as its own source line, so that ptxas says what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(_numbered(kernel), "utf-8")
        tools = triton.knobs.nvidia
        _run(tools.ptxas.path, "-lineinfo", f"--gpu-name={arch}", str(source), "-o", str(cubin))
        usage = _run(tools.cuobjdump.path, "--dump-resource-usage", str(cubin))
        sass = _run(tools.nvdisasm.path, "-g", "-c", str(cubin))
    found = _by_line(sass)
    names = [found.get(s.line, []) for s in kernel.statements]
    copies = _copies(kernel, names)
    return Compiled(
        int(re.search(r"\bREG:(\d+)", usage)[1]),
        int(re.search(r"\bSTACK:(\d+)", usage)[1]),
        sass,
        [len(some) / n for some, n in zip(names, copies, strict=True)],
        [sum(name.startswith(_SPECIAL) for name in some) / n for some, n in zip(names, copies, strict=True)],
    )


def _numbered(kernel: Kernel) -> str:
    statements = {s.line for s in kernel.statements}
    lines = []
    for number, line in enumerate(kernel.text.splitlines(), 1):
        if re.match(r"\s*\.section\s+\.debug", line):
            break
        if not re.match(r"\s*\.(loc|file)\s", line):
            lines.append(f".loc 1 {number} 1\n{line}" if number in statements else line)
    return "\n".join([*lines, '.file 1 "kernel.ptx"', ""])


def _by_line(sass: str) -> dict[int, list[str]]:
    """The opcodes that came of each line of PTX."""
    found: dict[int, list[str]] = {}
    line = 0
    for text in sass.splitlines():
        if where := _LINE.search(text):
            line = int(where[1])
        elif (opcode := _INSTRUCTION.match(text)) and opcode[1] != "NOP":
            found.setdefault(line, []).append(opcode[1])
    return found


def _copies(kernel: Kernel, names: Sequence[Sequence[str]]) -> list[int]:
    """How often each statement stands in the card's code. All of a basic block stand there equally often."""
    copies = [1] * len(names)
    targets = set(kernel.labels.values())
    first = 0
    for i, s in enumerate(kernel.statements):
        if i in targets:
            first = i
        opcode = _ONE_FOR_ONE.get(s.name.split(".")[0], "")
        n = sum(name.startswith(opcode) for name in names[i]) if opcode else 1
        copies[i] = max(1, n) if i == first else max(copies[i - 1], n)
        if s.name.startswith("bra") or i + 1 in targets or i + 1 == len(names):
            copies[first : i + 1] = [copies[i]] * (i + 1 - first)
            first = i + 1
    return copies


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
