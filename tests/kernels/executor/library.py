"""The C++ core: built by g++ when it is first needed, and called by ctypes."""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .ptx import NotModelled

_SOURCES = Path(__file__).parent / "core"
# Every operation must round as PTX says: no contraction of products and sums, integers that wrap around.
_FLAGS = ["-std=c++20", "-O3", "-march=native", "-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_FIELDS = ("operation", "guard", "negated", "operands", "registers", "results", "count", "bytes", "offset", "variant")
COUNTERS = ("issued", "lanes", "sectors", "wavefronts", "ideal")


class Instruction(ctypes.Structure):
    """As in ``state.hpp``, and so are the following."""

    _fields_ = [(name, ctypes.c_int32) for name in _FIELDS]


class Counters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in COUNTERS]


class Allocation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("begin", "end")),
        *((name, ctypes.c_int32) for name in ("writable", "granule", "traces")),
    ]


class Program(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("code", "operands", "constants")),
        *((name, ctypes.c_int32) for name in ("length", "slots", "warps", "shared_bytes")),
        *((name, ctypes.c_int32) for name in ("shared_granule", "asynchronous")),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("parameters", "allocations", "counters", "totals")),
        *((name, ctypes.c_int32) for name in ("n_allocations", "n_traces")),
        ("grid", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in ("reverse", "truncating", "counting")),
    ]


class Report(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char * 64),
        ("detail", ctypes.c_char * 256),
        *((name, ctypes.c_int32) for name in ("instruction", "cta", "warp", "lane")),
    ]


def why_not() -> str | None:
    """Why the core cannot be built here, or None if it can."""
    return None if shutil.which("g++") else "there is no g++ to build the executor of compiled kernels with"


@cache
def core() -> ctypes.CDLL:
    """The core's functions. Its library is kept in the temporary folder under a hash of all that it depends on."""
    sources = sorted(_SOURCES.iterdir())
    version = subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout
    digest = hashlib.sha256("\n".join([version, *_FLAGS, _processor(), *(x.read_text("utf-8") for x in sources)]).encode())
    folder = Path(tempfile.gettempdir()) / f"fedrot-executor-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user, whose library must not be loaded")
    path = folder / f"{digest.hexdigest()[:32]}.so"
    with (folder / "lock").open("w") as lock:  # one process builds, the others wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".tmp")
            command = ["g++", *_FLAGS, "-fPIC", "-shared", str(_SOURCES / "core.cpp"), "-o", str(unfinished)]
            subprocess.run(command, check=True)
            unfinished.rename(path)
    library = ctypes.CDLL(str(path))
    library.fedrot_find_operation.argtypes = [ctypes.c_char_p]
    library.fedrot_execute.argtypes = [ctypes.POINTER(x) for x in (Program, Launch, Report)]
    return library


@cache
def operation(name: str) -> int:
    """The number of an operation of the core.

    Raises:
        NotModelled: there is none of that name.
    """
    number: int = core().fedrot_find_operation(name.encode())
    if number < 0:
        raise NotModelled(f"no operation {name}")
    return number


def _processor() -> str:
    """What -march=native depends on."""
    cpu = Path("/proc/cpuinfo")
    flags = [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))] if cpu.exists() else []
    return "\n".join([platform.machine(), *flags[:1]])
