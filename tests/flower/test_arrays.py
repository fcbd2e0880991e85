"""State dicts as ArrayRecords: every dtype to the bit, and nothing decoded that does not add up."""

import io
import math
import random

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from safetensors.torch import save

from fedrot import UpdateError
from fedrot.adapters.keys import COUNTERS
from fedrot.flower import from_arrays, to_arrays

from ..peft_models import KINDS, client_updates
from ..refusals import refused


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "convolution", "modules to save"])
def test_adapters_travel_to_the_bit(kind):
    update = client_updates(KINDS[kind], 1)[0]
    back = from_arrays(ArrayRecord(dict(to_arrays(update))))
    assert list(back) == list(update)
    for key, x in update.items():
        assert back[key].dtype == x.dtype
        assert torch.equal(back[key].view(torch.uint8), x.contiguous().view(torch.uint8))


def test_bfloat16_takes_two_bytes_or_is_widened_for_flower():
    x = {"x": torch.randn(64, 48).bfloat16()}
    assert 2 * 64 * 48 <= len(to_arrays(x)["x"].data) < 2 * 64 * 48 + 200
    with pytest.raises(TypeError):  # rather than averaged as something else
        to_arrays(x)["x"].numpy()
    assert np.array_equal(to_arrays(x, widen=True)["x"].numpy(), x["x"].float().numpy())


def test_views_and_scalars_travel():
    x = torch.arange(12.0).reshape(3, 4)
    given = {
        "turned": x.T,
        "part": x[:, 1:3],
        "half": x.T.bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    back = from_arrays(to_arrays(given))
    assert back.keys() == given.keys()
    assert all(torch.equal(back[key], given[key]) and back[key].shape == given[key].shape for key in given)


def _npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b" " * (64 - (10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def _claiming(data: bytes, length: int) -> bytes:
    return data[:8] + length.to_bytes(2, "little") + data[10:]


def _saved(x: np.ndarray) -> bytes:
    np.save(stream := io.BytesIO(), x)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("stype", "data", "said"),
    [
        (
            "numpy.ndarray",
            _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"),
            "4000000000000 bytes",
        ),
        (
            "numpy.ndarray",
            _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }", b"\0\0\0\0"),
            "no .npy file",
        ),
        ("numpy.ndarray", _npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\0" * 8), "no .npy file"),
        ("numpy.ndarray", _saved(np.ones(3, complex)), "no .npy file"),
        ("numpy.ndarray", _saved(np.ones(3, ">f4")), "no .npy file"),
        ("numpy.ndarray", _saved(np.ones(3))[:-1], "needs 24 bytes, but 23"),
        ("numpy.ndarray", _saved(np.ones(3))[:100], "no .npy file"),
        # The header ends where the array begins, and claims to end behind it.
        ("numpy.ndarray", _claiming(_saved(np.ones(0)), 200), "no .npy file"),
        ("numpy.ndarray", b"not an array", "labelled float32 (3,)"),
        ("numpy.ndarray", b"", "no .npy file"),
        ("safetensors", b"\xff" * 40, "header"),
        ("safetensors", to_arrays({"x": torch.ones(3).bfloat16()})["x"].data[:-1], ""),
        ("pickle", b"", "serialised as 'pickle'"),
    ],
)
def test_arrays_that_do_not_add_up_are_refused(stype, data, said):
    with refused("client 3", "layer.lora_A.weight", said):
        from_arrays(ArrayRecord({"layer.lora_A.weight": Array("float32", (3,), stype, data)}), "client 3")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4), (2, 1, 3, 1)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_what_numpy_writes_is_read(shape, dtype):
    x = np.arange(math.prod(shape), dtype=dtype).reshape(shape)
    for given in (x, np.asfortranarray(x), x.T):
        back = from_arrays(ArrayRecord({"x": Array(given)}))["x"]
        assert np.array_equal(back.numpy(), given) and back.dtype == torch.from_numpy(given.copy()).dtype
        back += 1  # in memory of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_spoiled_array_is_refused_or_read_and_nothing_else(dtype):
    array = to_arrays({"x": torch.randn(4, 3).to(dtype)})["x"]
    draw, read = random.Random(0), 0
    for _ in range(3000):
        data = bytearray(array.data)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(data))
            choice = draw.random()
            if choice < 0.4:
                data[place] = draw.choice(b"{}()[]',:0123456789 -<>fiOTrue\n\xff\x00")
            elif choice < 0.7:
                del data[place]
            else:
                data.insert(place, draw.randrange(256))
        try:
            x = from_arrays(ArrayRecord({"x": Array(array.dtype, array.shape, array.stype, bytes(data))}))["x"]
        except UpdateError:
            continue
        assert x.nbytes <= len(data)
        read += 1
    assert 0 < read < 3000


@pytest.mark.parametrize("dtype", COUNTERS, ids=str)
def test_integers_travel(dtype):
    sent = {"steps": torch.ones((), dtype=dtype), "places": torch.arange(2).to(dtype)}
    received = from_arrays(to_arrays(sent))
    assert {key: (x.dtype, x.tolist()) for key, x in received.items()} == {"steps": (dtype, 1), "places": (dtype, [0, 1])}


def test_what_is_no_number_of_ours_does_not_travel():
    with refused("steps", "complex64", "(2,)"):
        to_arrays({"steps": torch.ones(2, dtype=torch.complex64)})
    eight_bits = Array("float8", (2,), "safetensors", save({"x": torch.ones(2).to(torch.float8_e4m3fn)}))
    with refused("client 1, steps", "float8_e4m3fn"):
        from_arrays(ArrayRecord({"steps": eight_bits}), "client 1")
