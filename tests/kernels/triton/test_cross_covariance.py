"""M = F F_refᵀ of every adapter and client, as the kernel's sums over slices."""

import pytest
import torch

from fedrot_kernels import reference
from fedrot_kernels.triton_backend.cross_covariance import slice_length
from fedrot_kernels.triton_backend.launch import padded_rank, rank_multiple
from fedrot_kernels.triton_backend.whole_model import Model

from .cases import BOTH_MODELS, DEVICE, DTYPES, EPS, GPU, LAYOUTS, RANKS, assert_as_accurate, place, random, rounding

pytestmark = pytest.mark.parametrize("triton_device", BOTH_MODELS, indirect=True)
LARGE = (33, 64, 100, 128)
ODD = [(1, 5), (65, 130), (511, 513), (1, 1)]
WIDE = [(8, 64), (512, 520), (128, 16)]


def model(shapes, n, dtype, layout="separate", ref_dtype=None, on=(0, 1), spoil=None):
    """What the kernel reads, and the frames (N, r, d) and references (r, d) it stands for."""
    A = [random(n, r, d_in, dtype=dtype, seed=i) for i, (r, d_in, _) in enumerate(shapes)]
    B = [random(n, d_out, r, dtype=dtype, seed=100 + i) for i, (r, _, d_out) in enumerate(shapes)]
    A_ref = [random(r, d_in, dtype=ref_dtype or dtype, seed=200 + i) for i, (r, d_in, _) in enumerate(shapes)]
    B_ref = [random(d_out, r, dtype=ref_dtype or dtype, seed=300 + i) for i, (r, _, d_out) in enumerate(shapes)]
    if spoil:
        spoil(A)
    placed = place(A + B, layout)
    refs = [[x.to(DEVICE) for x in of_factor] if factor in on else None for factor, of_factor in enumerate((A_ref, B_ref))]
    frames = {}
    for i in range(len(shapes)):
        frames[i, 0], frames[i, 1] = (A[i], A_ref[i]), (B[i].mT, B_ref[i].mT)
    return Model(placed[: len(A)], placed[len(A) :], *refs), {key: x for key, x in frames.items() if key[1] in on}


def check(model, frames):
    M, n, joint = model.cross_covariance().cpu(), model.n_clients, len(model.on) == 2
    for adapter, (r, *bounds) in enumerate(model.tables.adapters.tolist()):
        for at, factor in enumerate(model.on):
            F, F_ref = frames[adapter, factor]
            partial, d = M[bounds[2 * at] : bounds[2 * at + 1], : n + joint], F.shape[-1]
            terms = min(d, slice_length(model.RP))  # of the sums that the kernel makes; their sum here is in float64
            assert len(partial) == -(-d // slice_length(model.RP))
            assert not partial[:, :, r:].any() and not partial[:, :, :, r:].any()
            ours = partial[:, :, :r, :r].double().sum(0)
            for i, client in enumerate(F):
                exact, theirs = (
                    reference.cross_covariance(client.to(x), F_ref.to(x)) for x in (torch.float64, torch.float32)
                )
                magnitude = client.double().abs() @ F_ref.double().abs().T
                assert_as_accurate(ours[i], theirs, exact, rounding(terms) * magnitude)
            if joint:
                # The reference's own, whose trace scales M: squares, whose roundings may add up. Each product loses up to
                # 4 eps, and each of the steps, three tf32 products of 4 terms at a time, up to one eps of the sum so far.
                exact = F_ref.double() @ F_ref.double().T
                assert (ours[n] - exact).abs().max() <= (4 + 3 * -(-terms // 4)) * EPS * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", RANKS)
def test_odd_widths(r, dtype):
    case = model([(r, *d) for d in ODD], 3, dtype)
    assert not case[0].aligned
    check(*case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [4, 8, 16, 24, 32])
def test_wide_loads(r, dtype):
    case = model([(r, *d) for d in WIDE], 3, dtype, "slabs")
    assert case[0].aligned == (r % rank_multiple(padded_rank(r), dtype) == 0)
    check(*case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", LARGE)
def test_large_ranks(r, dtype):
    check(*model([(r, 65, 130)], 2, dtype))
    check(*model([(r, 136, 64)], 2, dtype))


@pytest.mark.parametrize("n", [1, 2, 50, *([1000] if GPU else [])])
@pytest.mark.parametrize("r", [1, 4, 12])
def test_any_number_of_clients(r, n):
    check(*model([(r, 33, 7)], n, torch.float32, "stacked"))


@pytest.mark.parametrize("r", [4, 16, 32, *([64, 128] if GPU else [])])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_slices_begin_and_end_where_they_should(beyond, r):
    d = slice_length(padded_rank(r))
    check(*model([(r, d + beyond, 2 * d + beyond), (r, 3, d)], 2, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [8, *([16, 64, 128] if GPU else [])])
def test_long_sums(r, dtype):
    check(*model([(r, 8192, 4096)], 3 if GPU else 1, dtype))


@pytest.mark.parametrize("on", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts_and_mixed_ranks(layout, on):
    check(*model([(4, 33, 20), (1, 7, 1), (3, 64, 48), (16, 1, 40), (12, 40, 513)], 3, torch.float32, layout, on=on))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ref_dtype", [torch.float16, torch.float32, torch.float64])
def test_references_of_another_dtype(ref_dtype, dtype):
    """float64 references are rounded to float32 first: so is the truth's."""
    case, frames = model([(4, 33, 20), (8, 513, 16)], 5, dtype, ref_dtype=ref_dtype)
    check(case, {key: (F, F_ref.float() if ref_dtype == torch.float64 else F_ref) for key, (F, F_ref) in frames.items()})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_client(bad):
    shapes = [(4, 600, 20), (8, 30, 16)]
    clean = model(shapes, 20, torch.float32)[0].cross_covariance()
    M = model(shapes, 20, torch.float32, spoil=lambda A: A[0][7, 3, 599].fill_(bad))[0].cross_covariance()
    expected = torch.zeros_like(M, dtype=torch.bool)
    expected[1, 7, 3] = True  # the second slice of A of adapter 0; also in the padding, where it meets zeros
    assert not M[expected].isfinite().any()
    assert torch.equal(M[~expected], clean[~expected])
