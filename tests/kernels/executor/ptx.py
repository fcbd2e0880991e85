"""PTX text as statements: what Triton's compiler prints of one kernel."""

import re
from dataclasses import dataclass

_STATEMENT = re.compile(r"^\s*(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*([^;]*);\s*(?://.*)?$")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+")
_LABEL = re.compile(r"^\s*(\$\w+):")
_PARAMETER = re.compile(r"\.param \.([a-z])(\d+)\b.*?(\w+)\s*,?\s*$")
_LOCATION = re.compile(r"^\s*\.loc\s.*?//\s*(\S+)")
_REGISTER = re.compile(r"%[a-z]+\d+")
_WITHOUT_RESULT = ("st.", "stmatrix", "bra", "ret", "bar", "fence", "wgmma.fence", "wgmma.commit", "wgmma.wait")
_SIZES = {"p": 4, "rs": 2, "r": 4, "f": 4, "rd": 8, "fd": 8}  # bytes of a register by its prefix; predicates have bits


class NotModelled(Exception):
    """PTX that the executor does not know."""


@dataclass(frozen=True)
class Statement:
    """One instruction.

    Attributes:
        name: the opcode with all its modifiers.
        operands: as they are written, a vector in braces or an address in brackets being one.
        guard: the predicate under which a thread executes it, or None.
        negated: whether the guard must be false.
        line: its number in the PTX text, from 1.
        source: file:line:column of the kernel's source that it came from.
    """

    name: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    line: int
    source: str


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        text: the PTX that it was read from.
        parameters: the size of each parameter in bytes by its name, in order.
        warps: warps of a CTA.
        statements: its instructions.
        labels: the index into ``statements`` at which each label stands.
    """

    text: str
    parameters: dict[str, int]
    warps: int
    statements: tuple[Statement, ...]
    labels: dict[str, int]


def parse(text: str) -> Kernel:
    """Read the only kernel of a PTX text.

    Raises:
        NotModelled: a line of its body that is no instruction, label or declaration.
    """
    parameters: dict[str, int] = {}
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    warps, source, inside = 0, "", False
    for number, line in enumerate(text.splitlines(), 1):
        if not inside:
            if found := _PARAMETER.search(line):
                parameters[found[3]] = int(found[2]) // 8
            elif found := re.match(r"\.reqntid (\d+)", line):
                warps = int(found[1]) // 32
            inside = line.startswith("{")
        elif line.startswith("}"):
            break
        elif found := _LOCATION.match(line):
            source = found[1]
        elif found := _LABEL.match(line):
            labels[found[1]] = len(statements)
        elif found := _STATEMENT.match(line):
            negated, guard, name, rest = found.groups()
            operands = tuple(_OPERAND.findall(rest))
            statements.append(Statement(name, operands, guard, negated == "!", number, source))
        elif (code := line.split("//")[0].strip()) and not code.startswith("."):
            raise NotModelled(f"line {number}: {code}")
    return Kernel(text, parameters, warps, tuple(statements), labels)


def registers(operand: str) -> list[str]:
    """The registers that an operand names; special ones such as %tid.x are not among them."""
    return _REGISTER.findall(operand)


def register_size(register: str) -> int:
    """Bytes of a register."""
    return _SIZES[register[1:].rstrip("0123456789")]


def results(statement: Statement) -> list[str]:
    """The registers that a statement writes."""
    return [] if statement.name.startswith(_WITHOUT_RESULT) else registers("".join(statement.operands[:1]))


def inputs(statement: Statement) -> list[str]:
    """The registers that a statement reads."""
    has_result = not statement.name.startswith((*_WITHOUT_RESULT, "wgmma.mma"))  # wgmma adds to what is there
    found = registers(" ".join(statement.operands[has_result:]))
    return [*found, statement.guard] if statement.guard else found
