"""The compiled library: where it is, what this machine can run of it, and the structure that it is called with."""

import ctypes
import os
import warnings
from functools import cache
from hashlib import sha256
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
SWITCH = "FEDROT_NATIVE"
_NAME = "_native"

Careful = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32)

_NUMBERS = [(name, ctypes.c_int32) for name in ("adapters", "clients", "reflections", "threads", "n_steps")]
_FACTORS = [(name, ctypes.c_void_p) for name in ("shapes", "dtypes", "A", "B", "A_ref", "B_ref")]
_INPUTS = [*_FACTORS, *((name, ctypes.c_void_p) for name in ("shares", "weights", "steps"))]
_OUTPUTS = [(name, ctypes.c_void_p) for name in ("R", "residual", "undetermined", "doubtful", "A_out", "B_out", "finite")]
_SKETCHES = [(name, ctypes.c_void_p) for name in ("shifts", "signs", "estimates", "squares")]


class Sweeps(ctypes.Structure):
    """``fedrot::Sweeps`` of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("others", "consensus", "slowest")),
        *((name, ctypes.c_int32) for name in ("most", "on")),
        ("unsure", ctypes.c_void_p),
    )


class Descent(ctypes.Structure):
    """``fedrot::Descent`` of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("others", "first", "shorter", "longer", "unbounded")),
        *((name, ctypes.c_double) for name in ("rounding", "least", "ridge", "strength")),
        ("shares", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("sweeps", "most")),
    )


class Problem(ctypes.Structure):
    """``fedrot::Problem`` of native.cpp."""

    _fields_ = (
        *_NUMBERS,
        ("strength", ctypes.c_float),
        ("converged", ctypes.c_float),
        *_INPUTS,
        *_OUTPUTS,
        *_SKETCHES,
        ("careful", Careful),
        ("failed", ctypes.c_void_p),
        ("lost", ctypes.c_void_p),
        ("sketches", ctypes.c_void_p),
        ("total", ctypes.c_float),
        ("adds", ctypes.c_int32),
        ("ref_dtypes", ctypes.c_void_p),
        ("sweeps", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("unsure", ctypes.c_void_p),
        ("descent", ctypes.c_void_p),
        ("angles", ctypes.c_void_p),
        ("products", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
    )


class Stream(ctypes.Structure):
    """``fedrot::Stream`` of stream_state.inc."""

    _fields_ = (
        ("problem", Problem),
        ("others", ctypes.c_int32),
        ("sides", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("places", "numels", "kinds", "sums", "sketches")),
        *((name, ctypes.c_void_p) for name in ("undetermined", "directions", "finite", "out", "dead", "numbers")),
        *((name, ctypes.c_double) for name in ("weight", "share", "total")),
    )


def hash_sources() -> int:
    """A hash of the sources beside this file, in 64 bits. setup.py builds it into the library."""
    digest = sha256()
    for path in sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".inc")):
        digest.update(path.name.encode() + path.read_bytes())
    return int.from_bytes(digest.digest()[:8], "little")


def _is_current(library: ctypes.CDLL) -> bool:
    """Whether a library was built from the sources beside this file, or by someone who did not say from which (0).

    The structures of another one may have other fields, and it would read memory that is not theirs.
    """
    try:
        library.fedrot_sources.restype = ctypes.c_uint64
        return library.fedrot_sources() in (0, hash_sources())
    except AttributeError:  # a library from before they were told apart
        return False


@cache
def load() -> ctypes.CDLL | None:
    """Load the library; None where it was not built, cannot be loaded, or was built from other sources, which is warned of.

    The environment variable ``FEDROT_NATIVE`` set to 0 keeps it off; a path names another library.
    """
    switch, here = os.environ.get(SWITCH, ""), Path(__file__).parent
    if switch == "0":
        return None
    built = [here / f"{_NAME}{suffix}" for suffix in EXTENSION_SUFFIXES]
    for path in [Path(switch)] if os.sep in switch else built:
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # of another machine
                continue
            if not _is_current(library):
                warnings.warn(f"{path} was built from other sources and is not used; pip install fedrot anew", stacklevel=2)
                continue
            library.fedrot_align_average.argtypes = [ctypes.POINTER(Problem), ctypes.c_int32]
            stream, address, size, level = ctypes.POINTER(Stream), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
            library.fedrot_stream.argtypes = [stream, ctypes.c_int32, level]
            library.fedrot_stream_look.argtypes = [stream, address, ctypes.c_char_p, size, level]
            library.fedrot_describe.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
            library.fedrot_finite.argtypes = [ctypes.c_void_p, ctypes.c_char_p, size, level]
            library.fedrot_zero.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p]
            return library
    return None


def instruction_set() -> str | None:
    """The instructions that the library runs here, "baseline", "avx2" or "avx512"; None without the library."""
    library = load()
    return None if library is None else INSTRUCTION_SETS[library.fedrot_level()]
