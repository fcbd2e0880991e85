"""Ā = Σ wᵢ RᵢᵀAᵢ and B̄ = Σ wᵢ BᵢRᵢ with given rotations."""

import pytest
import torch

from fedrot_kernels import reference
from fedrot_kernels.triton_backend.launch import padded_rank, rank_multiple
from fedrot_kernels.triton_backend.rotate_average import tile_length
from fedrot_kernels.triton_backend.whole_model import Model

from .cases import (
    BOTH_MODELS,
    DEVICE,
    DTYPES,
    GPU,
    LAYOUTS,
    RANKS,
    assert_as_accurate,
    place,
    random,
    rotations,
    rounding,
    shares,
)
from .cases import untouched_between as untouched

pytestmark = pytest.mark.parametrize("triton_device", BOTH_MODELS, indirect=True)
LARGE = (33, 64, 100, 128)


def check(shapes, weights, dtype, layout="separate", out_dtype=None, aligned=None):
    n, w, out_dtype = len(weights), shares(weights), out_dtype or dtype
    A = [random(n, r, d_in, dtype=dtype, seed=i) for i, (r, d_in, _) in enumerate(shapes)]
    B = [random(n, d_out, r, dtype=dtype, seed=100 + i) for i, (r, _, d_out) in enumerate(shapes)]
    R = [rotations(n, r, seed=i) for i, (r, _, _) in enumerate(shapes)]
    placed = place(A + B, layout)
    model = Model(placed[: len(A)], placed[len(A) :], None, None)
    assert aligned is None or model.aligned == aligned
    padded = torch.full((len(shapes), n, model.RP, model.RP), torch.nan)  # what lies beyond a rank is undefined
    for i, x in enumerate(R):
        padded[i, :, : x.shape[1], : x.shape[1]] = x
    means, finite = model.rotate_average(padded.to(DEVICE), w.float().to(DEVICE), out_dtype)
    assert bool(finite) and untouched(means)
    for i, (r, _, _) in enumerate(shapes):
        for mean, F in ((means[2 * i], A[i]), (means[2 * i + 1].mT, B[i].mT)):
            exact, theirs = (
                reference.rotate_average(list(F.to(x)), list(R[i].to(x)), w.tolist()) for x in (torch.float64, torch.float32)
            )
            magnitude = reference.rotate_average(list(F.double().abs()), list(R[i].double().abs()), w.tolist())
            assert mean.dtype == out_dtype
            assert_as_accurate(mean, theirs, exact, rounding(n * r) * magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", RANKS)
def test_odd_widths(r, dtype):
    check([(r, 1, 5), (r, 65, 130), (r, 1, 1)], [1.0, 3.0, 2.0], dtype, aligned=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [4, 8, 16, 24, 32])
def test_wide_loads(r, dtype):
    aligned = r % rank_multiple(padded_rank(r), dtype) == 0
    check([(r, 8, 64), (r, 136, 128), (r, 16, 8)], [1.0, 3.0, 2.0], dtype, "slabs", aligned=aligned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", LARGE)
def test_large_ranks(r, dtype):
    check([(r, 65, 130)], [1.0, 3.0], dtype)
    check([(r, 136, 64)], [1.0, 3.0], dtype)


@pytest.mark.parametrize("n", [1, 2, 50, *([1000] if GPU else [])])
@pytest.mark.parametrize("r", [1, 4, 12])
def test_any_number_of_clients(r, n):
    check([(r, 33, 7), (r, 1, 1)], [float(i % 4) for i in range(1, n + 1)], torch.float32, "stacked")


@pytest.mark.parametrize("beyond", [-1, 0, 1])
@pytest.mark.parametrize("r", [4, 32, *([64, 128] if GPU else [])])
def test_tiles_begin_and_end_where_they_should(r, beyond):
    d = tile_length(padded_rank(r))
    check([(r, d + beyond, 2 * d + beyond), (r, 3, d)], [1.0, 2.0], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts_and_mixed_ranks(layout, dtype):
    check([(4, 33, 20), (1, 7, 1), (3, 64, 48), (16, 1, 40), (12, 40, 513)], [1.0, 0.0, 2.0], dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_means_may_have_another_dtype(dtype):
    check([(4, 33, 20), (16, 8, 40)], [1.0, 2.0, 0.5], dtype, out_dtype=torch.float32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("factor", [0, 1])
def test_what_is_not_finite_shows_at_its_place_even_at_weight_zero(factor, bad):
    stacks = [random(3, 4, 300), random(3, 5, 4), random(3, 2, 9), random(3, 300, 2)]

    def run():
        placed = place(stacks, "separate")
        model = Model([placed[0], placed[2]], [placed[1], placed[3]], None, None)
        R = torch.zeros(2, 3, 4, 4)
        R[0], R[1, :, :2, :2] = rotations(3, 4), rotations(3, 2)
        return model.rotate_average(R.to(DEVICE), torch.tensor([0.25, 0.0, 0.75], device=DEVICE), torch.float32)

    clean, _ = run()
    stacks[3 * factor][1].view(-1)[-1] = bad
    means, finite = run()
    assert not bool(finite)
    for i, (mean, before) in enumerate(zip(means, clean, strict=True)):
        expected = torch.zeros_like(mean, dtype=torch.bool)
        if i == 3 * factor:
            (expected if factor else expected.mT)[-1] = True  # the column of A, or row of B
        assert torch.equal(mean.isnan(), expected)
        assert torch.equal(mean[~expected], before[~expected])
