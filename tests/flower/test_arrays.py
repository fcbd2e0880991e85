"""State dicts as ArrayRecords: every dtype to the bit, and nothing decoded that does not add up."""

import io

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

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
    assert all(torch.equal(back[key], given[key]) and back[key].shape == given[key].shape for key in given)


def _npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b" " * (64 - (10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


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
        ("numpy.ndarray", _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }", b"\0\0\0\0"), "(-1, -1)"),
        ("numpy.ndarray", _npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\0" * 8), "dtype object"),
        ("numpy.ndarray", _saved(np.arange(3)), "dtype int64"),
        ("numpy.ndarray", _saved(np.ones(3, ">f4")), "dtype >f4"),
        ("numpy.ndarray", _saved(np.ones(3))[:-1], "needs 24 bytes, but 23"),
        ("numpy.ndarray", b"not an array", "magic"),
        ("numpy.ndarray", b"", "magic"),
        ("safetensors", b"\xff" * 40, "header"),
        ("safetensors", to_arrays({"x": torch.ones(3).bfloat16()})["x"].data[:-1], ""),
        ("pickle", b"", "serialised as 'pickle'"),
    ],
)
def test_arrays_that_do_not_add_up_are_refused(stype, data, said):
    with refused("client 3", "layer.lora_A.weight", said):
        from_arrays(ArrayRecord({"layer.lora_A.weight": Array("float32", (3,), stype, data)}), "client 3")
