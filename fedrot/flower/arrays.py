"""Conversion of state dicts to Flower's ArrayRecords and back, bit for bit, bfloat16 too."""

import math
import re
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..adapters.keys import COUNTERS, DTYPES
from ..admission import make_one_line
from ..errors import UpdateError

NUMPY, SAFETENSORS = "numpy.ndarray", "safetensors"
_ONLY = "x"  # the name of an array's one tensor in safetensors
# The header that numpy.save writes for a little-endian array of numbers. numpy.load would evaluate any header as Python,
# and allocate the memory that it names before reading the data.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<f[248]|<i[248]|\|[iub]1)', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,15}, )*\d{0,15}),?\), \} *\n",
    re.DOTALL,
)


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
    return ArrayRecord({key: _encode(key, x, widen) for key, x in state_dict.items()})


def _encode(key: str, x: Tensor, widen: bool) -> Array:
    if x.dtype not in (*DTYPES, *COUNTERS):
        raise UpdateError(f"{key}: {x.dtype}, shape {tuple(x.shape)}; only floating-point tensors and integers are sent")
    x = x.detach().cpu()
    if x.dtype != torch.bfloat16:
        return Array(x.numpy())
    if widen:
        return Array(x.float().numpy())
    return Array("bfloat16", tuple(x.shape), SAFETENSORS, save({_ONLY: x.contiguous()}))


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
    return {key: _decode(array, f"{name}, {key}").to(device) for key, array in arrays.items()}


def _decode(array: Array, where: str) -> Tensor:
    try:
        if array.stype == SAFETENSORS:
            x = load(array.data)[_ONLY]
        elif array.stype == NUMPY:
            x = _decode_npy(array)
        else:
            raise ValueError(f"serialised as {array.stype!r}")
        if x.dtype not in (*DTYPES, *COUNTERS):
            raise ValueError(f"{x.dtype}, shape {tuple(x.shape)}")
    except (ValueError, KeyError, SafetensorError) as error:
        raise UpdateError(f"{where}: {error}; send what fedrot.flower.to_arrays makes of tensors") from error
    return x


def _decode_npy(array: Array) -> Tensor:
    data = array.data
    header = _NPY.match(data)
    if header is None or header.end() != 10 + int.from_bytes(data[8:10], "little"):
        labelled = make_one_line(f"{array.dtype} {tuple(array.shape)}")
        raise ValueError(f"labelled {labelled}, is no .npy file of floating-point numbers or integers")
    shape = tuple(int(size) for size in header[3].split(b", ") if size)
    dtype = np.dtype(header[1].decode())
    expected, behind = math.prod(shape) * dtype.itemsize, len(data) - header.end()
    if expected != behind:
        raise ValueError(f"{dtype} of shape {shape} needs {expected} bytes, but {behind} were sent")
    flat = np.frombuffer(data, dtype, offset=header.end()).copy()
    return torch.from_numpy(flat.reshape(shape, order="F" if header[2] == b"True" else "C"))
