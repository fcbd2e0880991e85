"""A driver of Triton whose device is the executor: Triton's own JIT binds, specialises and compiles for it."""

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .encoding import Program, encode
from .execution import Counts, Launch, Settings
from .memory import Extent, Tables, extent

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # the most that a CTA may have
_FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f"}


class Driver:
    """What Triton asks of a driver.

    Attributes:
        arch: 80 or 90.
        settings: how to execute.
        tables: the tensors behind the tables of addresses that kernels read.
        outputs: the names of the parameters that a kernel stores to, by the kernel's name. A kernel that is not named stores
            to those that begin with "p_out".
        launches: each launch so far and what it counted.
    """

    def __init__(self, arch: int, settings: Settings, outputs: dict[str, Sequence[str]]):
        self.arch, self.settings, self.outputs = arch, settings, outputs
        self.tables = Tables()
        self.launches: list[tuple[Launch, Counts]] = []
        self.utils = self
        self.launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """A device for each architecture, because Triton keeps compiled kernels by device."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[device]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, Program, int, int, int]:
        """Make a program of what stands in the place of a binary: PTX. No registers, no spills, 1024 threads at most."""
        return name, encode(binary.decode()), 0, 0, 1024


class _Launcher:
    """Launches one compiled kernel, again and again."""

    def __init__(self, source: Any, metadata: Any):
        self.name, self.shared = source.fn.__name__, metadata.shared
        self.signature: dict[str, str] = dict(source.signature)

    def __call__(self, x: int, y: int, z: int, stream: int, program: Program, *rest: Any) -> None:
        driver: Driver = triton.runtime.driver.active
        outputs = driver.outputs.get(self.name)
        extents: list[Extent] = []
        parameters = b""
        tensors = []
        for (name, kind), value in zip(self.signature.items(), rest[4:], strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, Tensor):
                writable = name.startswith("p_out") if outputs is None else name in outputs
                extents += [extent(value, writable=writable), *driver.tables.behind(value)]
                tensors.append(value)
                packed = struct.pack("Q", value.data_ptr())
            else:
                packed = struct.pack(_FORMATS[kind], value)
            parameters += bytes(-len(parameters) % len(packed)) + packed
        parameters += bytes(-len(parameters) % 8 + 2 * 8)  # scratch memory for the kernel and for a profiler: none
        launch = Launch(self.name, program, (x, y, z), parameters, tuple(extents), self.shared, driver.arch, tuple(tensors))
        driver.launches.append((launch, launch.execute(driver.settings)))


def ptx_instead_of_binary(*arguments: Any) -> tuple[str, str] | None:
    """The hook by which Triton lets its stages be changed: the last one, from PTX to a binary, keeps the PTX.

    Without arguments it is asked for the key under which Triton caches what is compiled so.
    """
    if not arguments:
        return "executor", "executor"
    stages: dict[str, Callable[[str, dict[str, Any]], bytes]] = arguments[1]
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None
