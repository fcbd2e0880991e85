"""State dicts as Flower's ArrayRecords and back, bit for bit, bfloat16 too."""

import math
from collections.abc import Mapping
from io import BytesIO

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import UpdateError

NUMPY, SAFETENSORS = "numpy.ndarray", "safetensors"
_ONLY = "x"  # the name of an array's one tensor in safetensors
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def to_arrays(state_dict: Mapping[str, Tensor], *, widen: bool = False) -> ArrayRecord:
    """A state dict as an ArrayRecord.

    float16, float32 and float64 travel as Flower's own arrays. NumPy has no bfloat16: it travels as safetensors, two bytes
    an entry, which ``from_arrays`` reads and Flower's own strategies and mods refuse (TypeError).

    Args:
        state_dict: tensors on any device.
        widen: send bfloat16 as float32, which loses nothing and which everything in Flower reads.
    """
    return ArrayRecord({key: _array(x.detach().cpu(), widen) for key, x in state_dict.items()})


def _array(x: Tensor, widen: bool) -> Array:
    if x.dtype != torch.bfloat16:
        return Array(x.numpy())
    if widen:
        return Array(x.float().numpy())
    return Array("bfloat16", tuple(x.shape), SAFETENSORS, save({_ONLY: x.contiguous()}))


def from_arrays(arrays: ArrayRecord, name: str = "the record", device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The state dict of an ArrayRecord, in memory of its own. Nothing is allocated that the bytes received do not fill.

    Args:
        arrays: what ``to_arrays`` or Flower made of floating-point tensors.
        name: how errors call the sender.
        device: where the tensors go.

    Raises:
        UpdateError: an array that cannot be decoded; its key is named.
    """
    return {key: _tensor(array, f"{name}, {key}").to(device) for key, array in arrays.items()}


def _tensor(array: Array, where: str) -> Tensor:
    try:
        if array.stype == SAFETENSORS:
            return load(array.data)[_ONLY]
        if array.stype == NUMPY:
            _check_size(array.data)
            return torch.from_numpy(array.numpy())
    except (ValueError, KeyError, SafetensorError) as error:
        raise UpdateError(f"{where}: {error}; send what fedrot.flower.to_arrays makes of a state dict") from error
    raise UpdateError(f"{where}: serialised as {array.stype!r}; send numpy.ndarray or safetensors, as to_arrays does")


def _check_size(data: bytes) -> None:
    """Raise ValueError unless the header of an .npy file describes exactly the bytes behind it, of float16, 32 or 64."""
    stream = BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f".npy format {version}")
    shape, _, dtype = _HEADERS[version](stream)
    if dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"dtype {dtype}, shape {shape}; only float16, float32 and float64 arrays are averaged")
    expected, behind = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if min(shape, default=0) < 0 or expected != behind:
        raise ValueError(f"{dtype} of shape {shape} needs {expected} bytes, but {behind} were sent")
