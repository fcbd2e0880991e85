"""Admission: values that spoil an average are found in every dtype and place, and no other value is refused."""

import math

import pytest
import torch

from fedrot.adapters.update import open_update
from fedrot.admission import Admission
from fedrot.methods.registry import make_method
from fedrot.options import AggregationOptions

from .refusals import refused

A, B, HEAD = "m.lora_A.weight", "m.lora_B.weight", "head.weight"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def adapter(dtype):
    return {A: torch.ones(2, 35, dtype=dtype), B: torch.ones(33, 2, dtype=dtype), HEAD: torch.ones(3, dtype=dtype)}


def check(update):
    expected = open_update(adapter(update[A].dtype), "the server")
    admission = Admission(expected, make_method(AggregationOptions()), 0, expected)
    admission.check(open_update(update, "client 3", expected))


@pytest.mark.parametrize("key", [A, B, HEAD])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.01e15, -1e30])
def test_a_value_that_spoils_an_average_is_found_in_any_place(key, dtype, value):
    for place in (0, adapter(dtype)[key].numel() // 2, -1):
        update = adapter(dtype)
        update[key].view(-1)[place] = value
        finite = math.isfinite(update[key].view(-1)[place].item())
        with refused("client 3", key, tuple(update[key].shape), "holds" if finite else "NaN or Inf"):
            check(update)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values_are_no_mistake(dtype):
    """Also where their squares overflow the dtype, or where many of them have a larger norm than one may be."""
    update = adapter(dtype)
    update[A].fill_(min(9e14, torch.finfo(dtype).max))
    update[B].fill_(-min(9e14, torch.finfo(dtype).max))
    check(update)


def test_dtypes_mixed():
    mixed = adapter(torch.float16) | {HEAD: torch.ones(3)}
    expected = open_update(mixed, "the server")
    admission = Admission(expected, make_method(AggregationOptions()), 0, expected)
    admission.check(open_update(mixed, "client 3", expected))
    with refused("client 3", HEAD, "NaN"):
        admission.check(open_update(mixed | {HEAD: torch.tensor([1, math.nan, 1])}, "client 3", expected))
