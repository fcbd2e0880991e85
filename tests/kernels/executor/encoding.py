"""Statements as the instructions of the C++ core: which operation, on which places of the register file."""

import re
from dataclasses import dataclass, replace

from . import library
from .allocation import allocate
from .ptx import Kernel, NotModelled, Statement, parse, register_size, registers, results

_CONSTANT = 1 << 31
_SPECIAL = {
    f"%{name}.{axis}": 3 * i + j for i, name in enumerate(("tid", "ctaid", "nctaid")) for j, axis in enumerate("xyz")
}
_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_MEMORY = re.compile(r"(ld|st)\.(global|shared|param)(?:\.v(\d))?\.([a-z])(\d+)")
_MATRICES = re.compile(r"(ldmatrix|stmatrix)\.sync\.aligned\.m8n8\.x(\d)(\.trans)?\.shared\.b16")
_PRODUCT = re.compile(r"mma\.sync\.aligned\.m16n8k(?:8|16)\.row\.col\.f32\.(tf32|f16|bf16)\.\1\.f32")
_ASYNCHRONOUS = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k(?:8|16)\.f32\.(tf32|f16|bf16)\.\1")
_SIZE = re.compile(r"\.(?:pred|[a-z]+(\d+)(?:x2)?)$")
_MEMBERS = {"-1", "0xffffffff"}  # masks of all lanes


@dataclass(frozen=True)
class Program:
    """A kernel that is ready to be executed.

    Attributes:
        kernel: what it came from.
        code: an instruction of the core per statement.
        operands: the places of all instructions' operands.
        constants: the values that instructions hold, each once per lane.
        slots: 32-bit registers of a lane.
        shared_granule: log2 of the bytes of the narrowest access to shared memory.
        asynchronous: whether there is a wgmma.
    """

    kernel: Kernel
    code: list[library.Instruction]
    operands: list[int]
    constants: bytes
    slots: int
    shared_granule: int
    asynchronous: bool

    def without(self, statement: int) -> "Program":
        """The same program with one statement left out."""
        code = [*self.code]
        code[statement] = library.Instruction(library.operation("nothing"), -1)
        return replace(self, code=code)


def encode(text: str) -> Program:
    """Make a program of PTX text.

    Raises:
        NotModelled: what the executor does not know, with its line.
    """
    kernel = parse(text)
    slots, total = allocate(kernel)
    return _Encoder(kernel, slots, total).program()


class _Encoder:
    def __init__(self, kernel: Kernel, slots: dict[str, int], total: int):
        self.kernel, self.slots = kernel, slots
        self.sink = total  # where what "_" names goes; two slots wide
        self.operands: list[int] = []
        self.constants: dict[tuple[int, int], int] = {}
        self.pool = bytearray()
        self.narrowest = 16
        self.offsets: dict[str, int] = {}
        end = 0
        for name, size in kernel.parameters.items():
            end = -(-end // size) * size
            self.offsets[name], end = end, end + size

    def program(self) -> Program:
        code = []
        for statement in self.kernel.statements:
            try:
                code.append(self.instruction(statement))
            except (NotModelled, KeyError, ValueError, TypeError) as error:
                where = f"line {statement.line}: {statement.name} {', '.join(statement.operands)}"
                raise NotModelled(f"{where}: {type(error).__name__} {error}") from error
        granule = self.narrowest.bit_length() - 1
        asynchronous = any(s.name.startswith("wgmma") for s in self.kernel.statements)
        return Program(self.kernel, code, self.operands, bytes(self.pool), self.sink + 2, granule, asynchronous)

    def instruction(self, s: Statement) -> library.Instruction:
        name, operands, fields = self.form(s)
        operation = library.operation(name)
        guard = -1 if s.guard is None else self.slots[s.guard]
        first = len(self.operands)
        self.operands += operands
        return library.Instruction(operation, guard, s.negated, first, len(operands), len(results(s)), **fields)

    def form(self, s: Statement) -> tuple[str, list[int], dict[str, int]]:
        """The core's name of an operation, its operands, and the other fields of its instruction."""
        if found := _MEMORY.fullmatch(s.name):
            return self.access(s, *found.groups())
        if found := _MATRICES.fullmatch(s.name):
            load, count, transposed = found[1] == "ldmatrix", int(found[2]), found[3] or ""
            matrices, address = s.operands if load else s.operands[::-1]
            place, offset = self.address(address)
            return found[1] + transposed, [*self.vector(matrices, 4), place], {"count": count, "offset": offset}
        if found := _PRODUCT.fullmatch(s.name):
            return f"mma.{found[1]}", [x for group in s.operands for x in self.vector(group, 4)], {}
        if found := _ASYNCHRONOUS.fullmatch(s.name):
            return self.asynchronous_product(s, found[1])
        if s.name.startswith("wgmma.wait_group"):
            return s.name, [], {"variant": int(s.operands[0])}
        if s.name.startswith("bra"):
            return "bra", [], {"offset": self.kernel.labels[s.operands[0]]}
        if s.name.startswith("mov"):
            return self.move(s)
        if s.name in ("bar.sync", "bar.warp.sync"):
            if s.operands not in (("0",), ("-1",)):
                raise NotModelled("a barrier of some threads only")
            return s.name, [], {}
        if s.name.startswith("shfl"):
            if s.operands[3] != "31" or s.operands[4] not in _MEMBERS:
                raise NotModelled("a shuffle of some lanes only")
            return s.name, [self.place(x, 4) for x in s.operands[:3]], {}
        if s.name.startswith("redux"):
            return s.name, [self.place(x, 4) for x in s.operands[:2]], {}
        return s.name, [self.place(x, size) for x, size in zip(s.operands, _sizes(s), strict=True)], {}

    def access(
        self, s: Statement, verb: str, space: str, length: str | None, kind: str, bits: str
    ) -> tuple[str, list[int], dict[str, int]]:
        size = int(bits) // 8
        values, address = s.operands if verb == "ld" else s.operands[::-1]
        found = registers(values)
        width = max(map(register_size, found), default=size)
        if space == "param":
            name = _ADDRESS.fullmatch(address)
            fields = {"offset": self.offsets[name[1]] + int(name[2] or 0), "bytes": width}
            return s.name, self.vector(values, size), fields
        place, offset = self.address(address)
        if space == "shared":
            self.narrowest = min(self.narrowest, size)
        if verb == "ld" and width > max(size, 4):
            name = f"ld.{space}.{'s' if kind == 's' else 'u'}{bits}.wide"
        elif kind == "s" and size < 4:
            raise NotModelled("a load that extends a sign")
        else:
            name = f"{verb}.{space}.b{bits}"
        places = self.vector(values, size)
        return name, [*places, place], {"count": int(length or 1), "offset": offset}

    def asynchronous_product(self, s: Statement, kind: str) -> tuple[str, list[int], dict[str, int]]:
        out, x, y, adds, *scales = s.operands
        if scales[:2] != ["1", "1"]:
            raise NotModelled("a product with a changed sign")
        in_shared = not x.startswith("{")
        transposed = [*([] if in_shared else ["0"]), *scales[2:], "0", "0"]
        variant = in_shared + 2 * int(transposed[0]) + 4 * int(transposed[1])
        places = [*self.vector(out, 4), *self.vector(x, 8 if in_shared else 4), self.place(y, 8), self.place(adds, 4)]
        return f"wgmma.{kind}", places, {"variant": variant}

    def move(self, s: Statement) -> tuple[str, list[int], dict[str, int]]:
        target, source = s.operands
        if source in _SPECIAL:
            return "special", [self.place(target, 4)], {"variant": _SPECIAL[source]}
        if s.name == "mov.pred":
            variant = -1 if source.startswith("%") else int(source) & 1
            return s.name, [self.place(x, 4) for x in s.operands[: 2 if variant < 0 else 1]], {"variant": variant}
        size = int(s.name[-2:]) // 8
        if source.startswith("{"):
            return f"{s.name}.pack", [self.place(target, size), *self.vector(source, size // 2)], {}
        if target.startswith("{"):
            return f"{s.name}.unpack", [*self.vector(target, size // 2), self.place(source, size)], {}
        return s.name, [self.place(target, size), self.place(source, size)], {}

    def address(self, text: str) -> tuple[int, int]:
        """The place of an address and what is added to it."""
        found = _ADDRESS.fullmatch(text)
        if not found:
            raise NotModelled(f"the address {text}")
        return self.place(found[1], 4), int(found[2] or 0)

    def vector(self, text: str, size: int) -> list[int]:
        """The places of a vector, or of a single operand."""
        return [self.place(x, size) for x in re.findall(r"[^\s,{}]+", text)]

    def place(self, text: str, size: int) -> int:
        """The place of one operand; constants have as many bytes as their register would have."""
        if text == "_":
            return self.sink
        if text.startswith("%"):
            return self.slots[text]
        value = 0 if text == "global_smem" else _number(text)
        width = 8 if size == 8 else 4
        key = (value & ((1 << 8 * width) - 1), width)
        if key not in self.constants:
            self.constants[key] = len(self.pool) // 128
            self.pool += key[0].to_bytes(width, "little") * 32
        return self.constants[key] | _CONSTANT


def _number(text: str) -> int:
    if text.startswith("0f"):
        return int(text[2:], 16)
    if text.startswith("0d"):
        return int(text[2:], 16)
    return int(text, 0)


def _sizes(s: Statement) -> list[int]:
    """Bytes of the operands of an arithmetic instruction."""
    found = _SIZE.search(s.name)
    size = int(found[1] or 32) // 8 if found else 4
    if s.name.startswith(("shl", "shr")):
        return [size, size, 4]
    if s.name.startswith("mul.wide"):
        return [2 * size, size, size]
    if s.name.startswith("mad.wide"):
        return [2 * size, size, size, 2 * size]
    if s.name.startswith("selp"):
        return [size, size, size, 4]
    return [size] * len(s.operands)
