"""Compiling a kernel for a GPU that is not there, and reading what it needs from the result."""

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedrot_kernels.triton_backend import cross_covariance, plain_average, polar, polar_blocked, rotate_average
from fedrot_kernels.triton_backend.launch import triton_dtype

from .compile_configurations import ARCHITECTURES, Configuration

KERNELS = {
    "cross_covariance": cross_covariance.cross_covariance_kernel,
    "polar": polar.polar_kernel,
    "polar_blocked": polar_blocked.polar_blocked_kernel,
    "rotate_average": rotate_average.rotate_average_kernel,
    "plain_average": plain_average.plain_average_kernel,
}
_FLOATS = ("floor", "shift", "strength")
_INT64 = ("p_table", "p_offsets")
_INT32 = ("p_items", "p_adapters", "p_finite")
# Per thread and instruction; what is not named here is at most 2 bytes wide.
_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs.

    Attributes:
        registers: vector registers per thread.
        stack: bytes of memory per thread. On NVIDIA it includes the registers spilled.
        spills: vector registers spilled, counted on AMD only.
        scalar_spills: scalar registers spilled to lanes of vector registers, on AMD; this touches no memory.
        shared: bytes of shared memory per program.
        widest_load: bytes that one thread reads at once from global memory.
        wide_loads: how many instructions read 16 bytes or more at once.
        traps: how many bare ``trap`` instructions, which Triton leaves where it could not compile a product.
    """

    registers: int
    stack: int
    spills: int
    scalar_spills: int
    shared: int
    widest_load: int
    wide_loads: int
    traps: int


@dataclass(frozen=True)
class Compiled:
    """A configuration and either its resources or the compiler's error."""

    configuration: Configuration
    resources: Resources | None
    error: str
    seconds: float


def compile_configuration(configuration: Configuration) -> Compiled:
    """Compile as the launcher would: integers not specialised, all pointers at multiples of 16 bytes, and on AMD within
    memory of 2 GiB each, which Triton's launch tells the compiler where it is so."""
    started = time.perf_counter()
    resources, error = None, ""
    try:
        resources = _resources(_compile(configuration), ARCHITECTURES[configuration.architecture].target)
    except Exception as failure:  # of any class, and not all of them travel between processes
        error = f"{type(failure).__name__}: {failure}"
    return Compiled(configuration, resources, error, time.perf_counter() - started)


def _compile(configuration: Configuration) -> Any:
    architecture, options = ARCHITECTURES[configuration.architecture], configuration.options
    kernel = KERNELS[configuration.kernel]
    signature = {p.name: _type_of(p.name, configuration) for p in kernel.params}
    attributes = [["tt.divisibility", 16]]
    if architecture.target.backend == "hip":
        attributes.append(["tt.pointer_range", 32])
    return triton.compile(
        ASTSource(
            kernel,
            signature,
            options.constants,
            {(i,): attributes for i, kind in enumerate(signature.values()) if kind.startswith("*")},
        ),
        target=architecture.target,
        options={"num_warps": options.num_warps, "num_stages": options.num_stages},
    )


def _type_of(name: str, configuration: Configuration) -> str:
    constants = configuration.options.constants
    if name in constants:
        return "constexpr"
    if name in _INT64 or (name == "p_items" and configuration.kernel == "plain_average"):
        return "*i64"
    if name in _INT32:
        return "*i32"
    if name.startswith("p_"):
        dtype = constants.get("OUT_DTYPE", constants.get("DTYPE")) if name == "p_out" else triton_dtype(torch.float32)
        return f"*{dtype}"
    return "fp32" if name in _FLOATS else "i32"


def _resources(compiled: Any, target: GPUTarget) -> Resources:
    read = _amd_resources if target.backend == "hip" else _nvidia_resources
    return Resources(shared=compiled.metadata.shared, **read(compiled.asm))


def _nvidia_resources(asm: Any) -> dict[str, int]:
    ptx = asm["ptx"]
    vectors = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.[^;]*\],\s*(\w+)", ptx)
    loads = [int(length or 1) * int(bits) // 8 for length, bits in vectors] + [int(size, 0) for size in copies]
    registers, stack = _cubin_usage(asm["cubin"])
    traps = len(re.findall(r"\btrap;", ptx))
    return {"registers": registers, "stack": stack, "spills": 0, "scalar_spills": 0, "traps": traps, **_widths(loads)}


def _amd_resources(asm: Any) -> dict[str, int]:
    assembly = asm["amdgcn"]
    kinds = re.findall(r"\b(?:global|buffer|flat)_load_([a-z]+\d?)", assembly)
    return {
        "registers": _amd_count(assembly, "vgpr_count"),
        "stack": _amd_count(assembly, "private_segment_fixed_size"),
        "spills": _amd_count(assembly, "vgpr_spill_count"),
        "scalar_spills": _amd_count(assembly, "sgpr_spill_count"),
        "traps": len(re.findall(r"\bs_trap\b", assembly)),
        **_widths([_AMD_BYTES.get(kind, 2) for kind in kinds]),
    }


def _widths(loads: list[int]) -> dict[str, int]:
    return {"widest_load": max(loads, default=0), "wide_loads": sum(size >= 16 for size in loads)}


def _amd_count(assembly: str, name: str) -> int:
    return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, as told by the cuobjdump of Triton's own wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"\bREG:(\d+)", usage)[1]), int(re.search(r"\bSTACK:(\d+)", usage)[1])
