"""Σ wᵢxᵢ of any tensors in one launch per dtype."""

import pytest
import torch

from fedrot_kernels.triton_backend.plain_average import BLOCK
from fedrot_kernels.triton_backend.whole_model import weighted_sums

from .cases import DEVICE, DTYPES, GPU, LAYOUTS, assert_as_accurate, place, random, rounding, shares, untouched_between

ODD = [(), (1,), (5, 1), (3, 65), (2, 3, 7), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (3, BLOCK + 5)]
WIDE = [(8,), (16, 8), (2, BLOCK), (3, 2 * BLOCK + 8)]


def check(stacks, weights, layout):
    w = shares(weights)
    means, finite = weighted_sums(place(stacks, layout), w.float().to(DEVICE))
    assert bool(finite) and finite.dtype == torch.bool and finite.shape == ()
    for dtype in {x.dtype for x in stacks}:
        assert untouched_between([mean for mean in means if mean.dtype == dtype])
    for mean, x in zip(means, stacks, strict=True):
        assert mean.dtype == x.dtype
        exact, theirs = (torch.tensordot(w.to(y), x.to(y), 1) for y in (torch.float64, torch.float32))
        assert_as_accurate(mean, theirs, exact, rounding(len(x)) * torch.tensordot(w, x.double().abs(), 1))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 50, *([1000] if GPU else [])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_and_number_of_clients(dtype, n):
    weights = [float(i % 4) for i in range(1, n + 1)]
    check([random(n, *shape, dtype=dtype, seed=i) for i, shape in enumerate(ODD)], weights, "stacked")


@pytest.mark.parametrize("layout", ["stacked", "separate", "slabs", "odd slabs", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_loads_and_where_they_are_impossible(dtype, layout):
    check([random(3, *shape, dtype=dtype, seed=i) for i, shape in enumerate(WIDE)], [1.0, 0.0, 2.0], layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout):
    check([random(3, *shape, seed=i) for i, shape in enumerate([(7, 9), (1, 5), (33, 40)])], [1.0, 0.5, 2.0], layout)


def test_dtypes_in_one_call():
    check([random(3, 5, i + 1, dtype=dtype, seed=i) for i in range(3) for dtype in DTYPES], [1.0, 2.0, 3.0], "separate")


def test_nothing_to_average_in_an_empty_tensor():
    means, finite = weighted_sums([torch.zeros(2, 0, 3, device=DEVICE)], torch.tensor([0.5, 0.5], device=DEVICE))
    assert bool(finite) and means[0].shape == (0, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_what_is_not_finite_shows_at_its_place_even_at_weight_zero(weight, bad):
    stacks = [random(3, 2000), random(3, 4, 4)]
    w = torch.tensor([0.75 - weight, weight, 0.25], device=DEVICE)
    clean, _ = weighted_sums(place(stacks, "separate"), w)
    stacks[0][1, 1999] = bad
    means, finite = weighted_sums(place(stacks, "separate"), w)
    assert not bool(finite)
    assert not means[0][1999].isfinite()
    assert torch.equal(means[0][:1999], clean[0][:1999]) and torch.equal(means[1], clean[1])


def test_an_average_that_overflows_its_dtype_is_not_finite():
    largest = torch.full((2, 9), 65504, dtype=torch.float16, device=DEVICE)
    means, finite = weighted_sums([largest], torch.ones(2, device=DEVICE))
    assert not bool(finite) and means[0].isinf().all()
