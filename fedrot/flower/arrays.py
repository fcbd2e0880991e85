"""Conversion of state dicts to Flower's ArrayRecords and back, bit for bit, bfloat16 too."""

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..adapters.keys import COUNTERS, DTYPES
from ..admission import make_one_line
from ..errors import UpdateError

NUMPY, SAFETENSORS = "numpy.ndarray", "safetensors"
_ONLY = "x"  # the name of an array's one tensor in safetensors
_SENT = frozenset({*DTYPES, *COUNTERS})
# The header that numpy.save writes for a little-endian array of numbers. numpy.load would evaluate any header as Python,
# and allocate the memory that it names before reading the data.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<f[248]|<i[248]|\|[iub]1)', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,15}, )*\d{0,15}),?\), \} *\n",
    re.DOTALL,
)
# How many headers are remembered in each direction. A model has a few, and a header has at most 64 KiB.
_HEADERS = 256


class _Header(NamedTuple):
    """What the header of a .npy file says, and how many bytes the header and the data take."""

    dtype: np.dtype
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    length: int
    data: int


def to_arrays(state_dict: Mapping[str, Tensor], *, widen: bool = False) -> ArrayRecord:
    """Convert a state dict to an ArrayRecord.

    float16, float32, float64 and integers travel as Flower's own arrays. NumPy has no bfloat16: it travels as safetensors,
    two bytes an entry, which ``from_arrays`` reads and Flower's own strategies and mods refuse (TypeError).

    Args:
        state_dict: tensors on any device.
        widen: send bfloat16 as float32, which loses nothing and which everything in Flower reads. Clients answer in the
            dtypes that they are sent.

    Raises:
        UpdateError: a tensor of another dtype; its key is named.
    """
    record = ArrayRecord()  # made of a dictionary, it would make every Array again
    for key, x in state_dict.items():
        record[key] = _encode(key, x, widen)
    return record


def _encode(key: str, x: Tensor, widen: bool) -> Array:
    if x.dtype not in _SENT:
        raise UpdateError(f"{key}: {x.dtype}, shape {tuple(x.shape)}; only floating-point tensors and integers are sent")
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16 and not widen:
        return Array("bfloat16", tuple(x.shape), SAFETENSORS, save({_ONLY: x}))
    array = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    label, header = _write_header(array.dtype, array.shape)
    return Array(label, array.shape, NUMPY, b"".join((header, array.data)))


@lru_cache(_HEADERS)
def _write_header(dtype: np.dtype, shape: tuple[int, ...]) -> tuple[str, bytes]:
    """Write Flower's label of a dtype, and the header of the .npy file of such an array."""
    said = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream := BytesIO(), said)
    return str(dtype), stream.getvalue()


def from_arrays(arrays: ArrayRecord, name: str = "the record", device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Convert an ArrayRecord to a state dict in memory of its own.

    Nothing is allocated that the bytes received do not fill.

    Args:
        arrays: floating-point tensors and integers, converted by ``to_arrays`` or by Flower.
        name: the sender's name in errors.
        device: where the tensors go.

    Raises:
        UpdateError: an array that cannot be decoded; its key is named.
    """
    opened = ((key, array.stype == NUMPY, _decode(array, name, key)) for key, array in arrays.items())
    return {key: x.to(device, copy=in_place) for key, in_place, x in opened}


def open_arrays(arrays: ArrayRecord, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Convert an ArrayRecord as ``from_arrays`` does, on a CPU without a copy.

    A tensor lies in the bytes received, and keeps them alive. Nobody may write to the tensor, which PyTorch cannot prevent:
    Python takes bytes for constant.
    """
    opened = {key: _decode(array, name, key) for key, array in arrays.items()}
    device = torch.device(device)
    return opened if device.type == "cpu" else {key: x.to(device) for key, x in opened.items()}


def _decode(array: Array, name: str, key: str) -> Tensor:
    try:
        if array.stype == SAFETENSORS:
            x = load(array.data)[_ONLY]
        elif array.stype == NUMPY:
            x = _decode_npy(array)
        else:
            raise ValueError(f"serialised as {array.stype!r}")
        if x.dtype not in _SENT:
            raise ValueError(f"{x.dtype}, shape {tuple(x.shape)}")
    except (ValueError, KeyError, SafetensorError) as error:
        raise UpdateError(f"{name}, {key}: {error}; send what fedrot.flower.to_arrays makes of tensors") from error
    return x


def _decode_npy(array: Array) -> Tensor:
    data = array.data
    header = _read_header(data[: 10 + int.from_bytes(data[8:10], "little")])
    if header is None:
        labelled = make_one_line(f"{array.dtype} {tuple(array.shape)}")
        raise ValueError(f"labelled {labelled}, is no .npy file of floating-point numbers or integers")
    if header.data != len(data) - header.length:
        raise ValueError(
            f"{header.dtype} of shape {header.shape} needs {header.data} bytes, but {len(data) - header.length} were sent"
        )
    x = np.ndarray(header.shape, header.dtype, data, header.length, order=header.order)
    if not x.flags.aligned:
        x = x.copy(order="K")
    # torch.from_numpy warns of memory that cannot be written to; DLPack has a flag for such memory.
    return from_dlpack(x.__dlpack__(max_version=(1, 0)))


@lru_cache(_HEADERS)
def _read_header(header: bytes) -> _Header | None:
    """Read the header of a .npy file; None unless it is whole and of such numbers as are sent."""
    found = _NPY.fullmatch(header)
    if found is None or len(header) != 10 + int.from_bytes(header[8:10], "little"):
        return None
    shape = tuple(int(size) for size in found[3].split(b", ") if size)
    dtype = np.dtype(found[1].decode())
    return _Header(dtype, shape, "F" if found[2] == b"True" else "C", len(header), math.prod(shape) * dtype.itemsize)
