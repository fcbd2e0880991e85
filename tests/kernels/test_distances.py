"""Distances between updates, against dense float64 arithmetic, however the clients' factors are turned."""

import pytest
import torch

from fedrot_kernels import squared_distances, squared_distances_plain
from fedrot_kernels.distances import between_updates
from fedrot_kernels.native_backend.distances import measure_products

from .test_native import HERE, SETS

needs_library = pytest.mark.skipif(HERE is None, reason="the compiled library is not built, or switched off")

SHAPES = [(4, 30, 33), (8, 5, 7), (1, 16, 3)]  # r, d_in, d_out; one with r larger than either
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def draw(n, shape, spread=1.0, seed=0, dtype=torch.float64):
    """Clients that differ from one adapter by ``spread`` of its size."""
    r, d_in, d_out = shape
    g = torch.Generator().manual_seed(seed)
    A0, B0 = torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g)
    A = [(A0 + spread * torch.randn(r, d_in, generator=g)).to(dtype) for _ in range(n)]
    B = [(B0 + spread * torch.randn(d_out, r, generator=g)).to(dtype) for _ in range(n)]
    return A, B


def dense(A, B, scales=None):
    """The squared distances, and what the products that they are differences of add up to."""
    s = scales or [1.0] * len(A)
    W = torch.stack([(x * b.double() @ a.double()).flatten() for x, a, b in zip(s, A, B, strict=True)])
    return torch.stack([(W - w).square().sum(1) for w in W])


def turned(A, B, seed=1, condition=10.0):
    """The same updates in a basis each, of condition numbers up to this one."""
    g = torch.Generator().manual_seed(seed)
    r = A[0].shape[0]
    turns = []
    for _ in A:
        U, V = (torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64)).Q for _ in range(2))
        turns.append(U * condition ** (torch.rand(r, generator=g) - 0.5) @ V)
    return [torch.linalg.solve(G, a.double()) for G, a in zip(turns, A, strict=True)], [
        b.double() @ G for G, b in zip(turns, B, strict=True)
    ]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_those_of_the_updates(shape, dtype):
    A, B = draw(5, shape, dtype=dtype)
    found = squared_distances([A, A], [B, B])
    assert found.shape == (2, 5, 5) and found.dtype == torch.float64
    for D in found:
        torch.testing.assert_close(D, dense(A, B), rtol=1e-12, atol=0)
        assert torch.equal(D, D.T) and not D.diagonal().any()


@pytest.mark.parametrize("spread", [1e-2, 1e-5, 1e-8])
def test_clients_that_differ_little_lose_nothing(spread):
    """Without a centre the squares would be rounded to 1e-16 of the update's, and the smallest of these be zero."""
    A, B = draw(6, SHAPES[0], spread)
    a, b = ([x - F[0] for x in F] for F in (A, B))
    # (B_0 + b)(A_0 + a) − B_0A_0, by terms that are all small
    W = torch.stack([(B[0] @ y + x @ A[0] + x @ y).flatten() for y, x in zip(a, b, strict=True)])
    expected = torch.stack([(W - w).square().sum(1) for w in W])
    torch.testing.assert_close(squared_distances([A], [B])[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_distances_do_not_depend_on_bases(spread, condition):
    A, B = draw(6, SHAPES[0], spread)
    there = squared_distances(*([x] for x in turned(A, B, condition=condition)))
    # Rounding of BᵢG and G⁻¹Aᵢ, of which the distance is a difference.
    size = max(float(a.square().sum() * b.square().sum()) for a, b in zip(A, B, strict=True))
    torch.testing.assert_close(there[0], dense(A, B), rtol=1e-12, atol=64 * EPS[torch.float64] * size * condition**2)


def test_one_update_in_many_bases_has_no_distance():
    A, B = draw(1, SHAPES[0])
    assert not squared_distances(*([x] for x in turned(A * 7, B * 7, condition=1e3))).any()


@pytest.mark.parametrize("factors", [(1e10, 1e10), (1e12, 1e-12), (1e-150, 1e150), (0, 1), (0, 0)])
def test_a_client_of_another_magnitude_spoils_no_one_elses_distances(factors):
    A, B = draw(7, SHAPES[0], 1e-6)
    expected = squared_distances([A[1:]], [B[1:]])[0]
    A[0], B[0] = A[0] * factors[0], B[0] * factors[1]
    torch.testing.assert_close(squared_distances([A], [B])[0, 1:, 1:], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("client", range(5))
def test_a_client_whose_factors_have_another_ratio_spoils_nothing(client):
    A, B = draw(5, SHAPES[0], 1e-6)
    expected = squared_distances([A], [B])[0]
    A[client], B[client] = A[client] * 2.0**40, B[client] * 2.0**-40
    torch.testing.assert_close(squared_distances([A], [B])[0], expected, rtol=1e-6, atol=0)


def test_scales_and_unequal_ranks():
    A, B = draw(3, SHAPES[0])
    A[1], B[1] = A[1][:2], B[1][:, :2]
    scales = [2.0, 0.5, 1.0]
    torch.testing.assert_close(squared_distances([A], [B], [scales])[0], dense(A, B, scales), rtol=1e-12, atol=0)


@needs_library
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 530, 261), (16, 64, 100), (32, 9, 40)], ids=str)
def test_the_compiled_library_finds_the_same_in_float64(shape, dtype, instructions):
    for n, spread in ((1, 1.0), (2, 1.0), (5, 1e-2), (11, 1.0)):
        A, B = draw(n, shape, spread, dtype=dtype)
        expected = squared_distances([A, A], [B, B], backend="torch")
        found = between_updates(*measure_products([A, A], [B, B], instructions))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
        A[-1], B[-1] = A[-1] * 2.0**10, B[-1] * 2.0**-10
        torch.testing.assert_close(
            between_updates(*measure_products([A], [B], instructions))[0], dense(A, B), rtol=1e-7, atol=0
        )


@needs_library
def test_what_holds_nan_or_is_zero_in_the_compiled_library():
    A, B = draw(5, SHAPES[0], dtype=torch.float32)
    for i in (0, 3):
        zero = [x if j != i else torch.zeros_like(x) for j, x in enumerate(B)]
        torch.testing.assert_close(squared_distances([A], [zero])[0], dense(A, zero), rtol=1e-12, atol=0)
        broken = [x if j != i else torch.full_like(x, torch.nan) for j, x in enumerate(B)]
        found = squared_distances([A], [broken])[0]
        assert not found[i].isfinite().all()
    assert not squared_distances([A], [[torch.zeros_like(x) for x in B]]).any()


def test_what_overflows_is_not_finite_and_nothing_else_is():
    A, B = draw(4, SHAPES[0])
    A[2] = A[2] * 1e200
    found = squared_distances([A], [B])[0]
    assert not found[2, :2].isfinite().any()
    A[2] = torch.full_like(A[2], torch.nan)
    assert not squared_distances([A], [B])[0].isfinite().all()


@pytest.mark.parametrize("size", [1, 1000])
def test_distances_of_plain_tensors(size, monkeypatch):
    monkeypatch.setattr("fedrot_kernels.distances._ENTRIES", 1 << 10)
    g = torch.Generator().manual_seed(0)
    x = 1 + 1e-6 * torch.randn(5, size, generator=g, dtype=torch.float64)
    x[4] *= 1e8
    expected = torch.stack([(x - y).square().sum(1) for y in x])
    torch.testing.assert_close(squared_distances_plain([x, x])[1][:4, :4], expected[:4, :4], rtol=1e-6, atol=0)
    torch.testing.assert_close(squared_distances_plain([x])[0], expected, rtol=1e-6, atol=0)


def test_many_adapters_and_clients_in_parts(monkeypatch):
    monkeypatch.setattr("fedrot_kernels.distances._ENTRIES", 1 << 11)
    pairs = [draw(30, shape, seed=seed) for seed, shape in enumerate(SHAPES * 3)]
    for (A, B), D in zip(pairs, squared_distances(*zip(*pairs, strict=True)), strict=True):
        torch.testing.assert_close(D, dense(A, B), rtol=1e-12, atol=0)
