"""The least error by the compiled library against PyTorch's in float64: every instruction set, ranks, dtypes, threads, small
errors, and what it leaves to PyTorch."""

import functools

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels.native_backend import least_error as module
from fedrot_kernels.native_backend.least_error import least_error_average

from .groups import clients
from .test_native import HERE, SETS, inside

pytestmark = pytest.mark.skipif(HERE is None, reason="the compiled library is not built, or switched off")
OPTIONS = {"reflections": False, "strength": 1.0}


def near_a_reference(r, widths, n, dtype=torch.float32, seed=0, **options):
    """Per adapter A, B and references: n clients near a reference, in bases of their own."""
    A, B, A_ref, B_ref = clients(seed, options.pop("drift", 0.3), dtype, [(r, *w) for w in widths], n=n, **options)
    return list(map(list, A)), list(map(list, B)), A_ref, B_ref


def exactly(A, B, weights, A_ref, B_ref, **options):
    """PyTorch's, in float64."""
    A, B = ([[x.double() for x in of_adapter] for of_adapter in factors] for factors in (A, B))
    refs = {"A_ref": [x.double() for x in A_ref], "B_ref": [x.double() for x in B_ref]}
    return fk.align_together(A, B, weights, **refs, **options)


def lost(A, B, R, weights):
    """‖Σ wᵢBᵢAᵢ − B̄Ā‖_F of one adapter, by its definition, and the means."""
    w = torch.tensor(weights, dtype=torch.float64)[:, None, None] / sum(weights)
    A, B, R = torch.stack(A).double(), torch.stack(B).double(), R.double()
    mean_A, mean_B = (w * R.mT @ A).sum(0), (w * B @ R).sum(0)
    return float(torch.linalg.norm((w * B @ A).sum(0) - mean_B @ mean_A)), mean_A, mean_B


def check(found, numbers, exact, A, B, weights, rtol=1e-6):
    """Errors as the descent in float64 has them, and means, rotations and numbers that belong together."""
    for i in range(len(A)):
        error, mean_A, mean_B = lost(A[i], B[i], found.R[i], weights)
        rounding = 2e-7 * float(exact.update_norm[i])  # of rotations to float32
        assert error <= (1 + rtol) * float(exact.error[i]) + rounding
        expected = torch.tensor([error, exact.update_norm[i], exact.plain_error[i]], dtype=torch.float64)
        torch.testing.assert_close(numbers[i], expected, rtol=1e-6, atol=rounding)
        for mean, by_R in ((found.A[i], mean_A), (found.B[i], mean_B)):
            eps = torch.finfo(mean.dtype).eps
            assert (mean - by_R).abs().max() <= (eps / 2 + 1e-6 * by_R.shape[0] ** 0.5) * by_R.abs().max()


@functools.lru_cache(maxsize=1)  # the same for every instruction set
def given_and_expected(r, n):
    widths = [(2 * r + 3, 3 * r + 5), (1040, 4 * r)] if r <= 16 else [(2 * r + 3, 3 * r + 5)]
    A, B, A_ref, B_ref = near_a_reference(r, widths, n, seed=r)
    weights = [0.0 if i == 1 else 1.0 + i % 3 for i in range(n)]
    return A, B, A_ref, B_ref, weights, exactly(A, B, weights, A_ref, B_ref)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("n", [1, 2, 5, 12])
@pytest.mark.parametrize("r", [*range(1, 10), 12, 16, 17, 33, 64])
def test_every_rank_on_every_instruction_set(r, n, instructions):
    """Odd widths over several panels, unaligned memory between NaNs, a client without weight."""
    A, B, A_ref, B_ref, weights, exact = given_and_expected(r, n)
    placed = [[[inside(x, i % 5 + 1) for i, x in enumerate(of_adapter)] for of_adapter in factors] for factors in (A, B)]
    refs = {"A_ref": [inside(x, 1) for x in A_ref], "B_ref": [inside(x, 3) for x in B_ref]}
    found, numbers, left = least_error_average(*placed, weights, **refs, **OPTIONS, instructions=instructions)
    assert not left and bool(found.finite) and found.residual.max() <= 2e-6
    assert all(bool((torch.linalg.det(R) > 0).all()) for R in found.R)
    check(found, numbers, exact, A, B, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{"strength": 0.3}, {"reflections": True}, {"reflections": True, "strength": 0.7}])
@pytest.mark.parametrize("r", [4, 5, 16])
def test_every_option_and_dtype(r, options, dtype):
    A, B, A_ref, B_ref = near_a_reference(r, [(70, 45), (33, 130)], 7, dtype)
    if options.get("reflections"):
        for a, b in zip(A, B, strict=True):
            a[0], b[0] = a[0].flip(0).contiguous(), b[0].flip(1).contiguous()
    weights, refs = [1.0 + i % 3 for i in range(7)], {"A_ref": A_ref, "B_ref": B_ref}
    found, numbers, left = least_error_average(A, B, weights, **refs, **(OPTIONS | options))
    assert not left and all(x.dtype == dtype for x in (*found.A, *found.B))
    check(found, numbers, exactly(A, B, weights, **refs, **options), A, B, weights)
    together = fk.align_together(A, B, weights, **refs, **options)
    assert torch.equal(torch.stack([together.error, together.update_norm, together.plain_error], dim=1), numbers)
    assert all(torch.equal(x, y) for x, y in zip(together.R, found.R, strict=True))


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("drift", "rtol"), [(0.1, 1e-5), (0.03, 1e-4), (0.01, 2e-3), (0.003, 5e-3)])
def test_small_errors(drift, rtol, turned):
    """Squared errors are differences of the squared update, whose float64 rounding bounds how far the descent can see."""
    A, B, A_ref, B_ref = near_a_reference(8, [(40, 24), (90, 70)], 5, drift=drift, turned=turned)
    weights = [3.0, 1.0, 2.0, 0.0, 5.0]
    found, numbers, left = least_error_average(A, B, weights, A_ref=A_ref, B_ref=B_ref, **OPTIONS)
    assert not left
    exact = exactly(A, B, weights, A_ref, B_ref)
    for i in range(len(A)):
        error = lost(A[i], B[i], found.R[i], weights)[0]
        assert error <= (1 + rtol) * float(exact.error[i]) and error <= 1.0001 * float(exact.plain_error[i])
        assert abs(float(numbers[i, 0]) - error) <= rtol * error


@pytest.mark.parametrize("instructions", SETS)
def test_the_number_of_threads_changes_no_bit(instructions, monkeypatch):
    A, B, A_ref, B_ref = near_a_reference(5, [(33, 20), (70, 40)] * 4, 6)
    results = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found, numbers, left = least_error_average(
            A, B, [1.0] * 6, A_ref=A_ref, B_ref=B_ref, **OPTIONS, instructions=instructions
        )
        assert not left
        results.append([*found.A, *found.B, *found.R, numbers])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_what_it_does_not_find_is_pytorchs():
    """An ill-conditioned adapter, one whose squares float32 does not hold, and one that is not finite."""
    A, B, A_ref, B_ref = near_a_reference(4, [(33, 20)] * 5, 5)
    for x in (*A[1], A_ref[1]):
        x[3] = 1e-6 * x[2]
    for x in (*B[1], B_ref[1]):
        x[:, 3] = 1e-6 * x[:, 2]
    A[2], A_ref[2] = [1e20 * x for x in A[2]], 1e20 * A_ref[2]
    A[3][2][0, 0] = torch.inf
    weights, refs = [1.0] * 5, {"A_ref": A_ref, "B_ref": B_ref}
    assert least_error_average(A, B, weights, **refs, **OPTIONS)[2] == [1, 2, 3]
    found = fk.align_together(A, B, weights, **refs)
    given, references = (A[1:4], B[1:4]), {"A_ref": A_ref[1:4], "B_ref": B_ref[1:4]}
    plain = fk.align_together(*given, weights, **references, backend="torch")
    assert not bool(found.finite) and not bool(plain.finite)
    for name in ("A", "B", "R", "residual", "error", "update_norm", "plain_error"):
        for x, y in zip(getattr(found, name)[1:4], getattr(plain, name), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert found.error[[0, 4]].isfinite().all()


def test_what_is_zero():
    A, B, A_ref, B_ref = near_a_reference(4, [(33, 20)] * 4, 5)
    for x in (*B[1], B_ref[1], B_ref[2], *A[3], A_ref[3], *B[3], B_ref[3], A[0][0], B[0][0]):
        x.zero_()
    weights, refs = [1.0] * 5, {"A_ref": A_ref, "B_ref": B_ref}
    found = fk.align_together(A, B, weights, **refs)
    exact = exactly(A, B, weights, **refs)
    assert bool(found.finite) and not found.B[1].any() and not found.A[3].any() and not found.error[[1, 3]].any()
    assert torch.equal(found.R[3], torch.eye(4).expand(5, 4, 4))
    torch.testing.assert_close(found.error, exact.error, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e-23, 1e-24, 1e-30])
def test_factors_whose_squares_underflow_are_not_zero(size):
    A, B, A_ref, B_ref = near_a_reference(4, [(33, 20)], 5)
    small = [[x * size for x in A[0]]], [A_ref[0] * size]
    found = fk.align_together(small[0], B, [1.0] * 5, A_ref=small[1], B_ref=B_ref)
    exact = exactly(small[0], B, [1.0] * 5, A_ref=small[1], B_ref=B_ref)
    assert exact.error > 0 and exact.update_norm > 0
    torch.testing.assert_close(found.error, exact.error, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.update_norm, exact.update_norm, rtol=1e-5, atol=0)


def test_more_rows_than_memory_is_taken_for_are_pytorchs(monkeypatch):
    A, B, A_ref, B_ref = near_a_reference(4, [(33, 20)], 5)
    monkeypatch.setattr(fk.groupwise.together, "MOST_ROWS", 27)
    found = fk.align_together(A, B, [1.0] * 5, A_ref=A_ref, B_ref=B_ref)
    monkeypatch.setattr(module, "align_average", None)  # not called
    assert torch.equal(found.R[0], fk.align_together(A, B, [1.0] * 5, A_ref=A_ref, B_ref=B_ref).R[0])
