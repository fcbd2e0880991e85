"""Sketches that estimate errors: unbiased, with a standard deviation that is true, the same on every backend."""

import math

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels.native_backend import library
from fedrot_kernels.sketch import SKETCH_SIZE, projection

HERE = library.instruction_set()
SETS = () if HERE is None else library.INSTRUCTION_SETS[: library.INSTRUCTION_SETS.index(HERE) + 1]
WEIGHTS = [1.0, 0.0, 2.5, 4.0]


def clients(r, d_in, d_out, n=4, *, noise=0.3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    A_ref, B_ref = torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g)
    A = [(A_ref + noise * torch.randn(r, d_in, generator=g)).to(dtype) for _ in range(n)]
    B = [(B_ref + noise * torch.randn(d_out, r, generator=g)).to(dtype) for _ in range(n)]
    return [A], [B], [A_ref.to(dtype)]


def exact_square(A, B, R, weights):
    """‖Σ wᵢBᵢAᵢ − B̄Ā‖² from its definition."""
    w = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    A, B = torch.stack(A), torch.stack(B)
    if R is not None:
        A, B = R.mT @ A, B @ R
    mean = torch.einsum("n,nij->ij", w, B @ A)
    return float((mean - torch.einsum("n,nij->ij", w, B) @ torch.einsum("n,nij->ij", w, A)).square().sum())


@pytest.mark.parametrize("d", [1, 31, 32, 33, 1024])
def test_a_projection_is_a_count_sketch_of_blocks_whose_quads_change_places(d):
    found = projection(3, "A", d)
    assert found.matrix.shape == (d, 32)
    assert torch.equal(found.matrix.abs().sum(1), torch.ones(d, dtype=torch.float64))
    for c in range(d):
        bucket = int(found.matrix[c].abs().argmax())
        block, j = divmod(c, 32)
        assert bucket == j ^ (4 * int(found.shifts[block]))
        assert found.matrix[c, bucket] == found.quads[c // 4] == found.buckets[32 * block + bucket]
    assert not torch.equal(projection(3, "B", 1024).quads, projection(3, "A", 1024).quads)
    assert projection(3, "A", d) is found


@pytest.mark.parametrize("shape", [(4, 96, 64), (3, 300, 170), (16, 128, 256)])
def test_estimates_are_unbiased_and_their_deviations_true(shape):
    A, B, A_ref = clients(*shape)
    R = fk.align_average(A, B, WEIGHTS, A_ref=A_ref).R[0]
    exact = exact_square(A[0], B[0], R, WEIGHTS), exact_square(A[0], B[0], None, WEIGHTS)
    w = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)
    update = float(torch.einsum("n,nij->ij", w, torch.stack(B[0]) @ torch.stack(A[0])).square().sum())
    runs = 100
    found = torch.stack(
        [fk.align_average(A, B, WEIGHTS, A_ref=A_ref, sketch_seed=s).estimates.numbers[0] for s in range(runs)]
    )
    for value, deviation, truth in (
        (found[:, 0], found[:, 1], exact[0]),
        (found[:, 2], found[:, 3], exact[1]),
        (found[:, 4] + found[:, 6], found[:, 5], update),
    ):
        assert abs(value.mean() - truth) <= 4 * value.std() / math.sqrt(runs)
        assert 0.8 <= float(deviation.mean() / value.std()) <= 1.6
    one = fk.align_average(A, B, WEIGHTS, A_ref=A_ref, sketch_seed=0).estimates
    assert float(one.squares.sum()) == pytest.approx(float(one.numbers[0, 0]))


@pytest.mark.parametrize("n", [2, 7])
def test_the_variance_of_an_estimate_is_that_of_independent_projections(n):
    """Relative variance of the squares 2(1 + (2k + 1) ρ)/k², of two clients (E of low rank) and of seven."""
    A, B, _ = clients(4, 700, 500, n)
    w = torch.full((n,), 1 / n, dtype=torch.float64)
    E = torch.einsum("n,nij->ij", w, torch.stack(B[0]) @ torch.stack(A[0])) - sum(B[0]) @ sum(A[0]) / n**2
    S = torch.linalg.svdvals(E)
    rho = float(S.pow(4).sum() / S.pow(2).sum() ** 2)
    squares = [fk.average_factors(A, B, [1.0] * n, sketch_seed=seed).estimates.numbers[0, 0] for seed in range(300)]
    expected = 2 * (1 + (2 * SKETCH_SIZE + 1) * rho) / SKETCH_SIZE**2
    assert float((torch.stack(squares) / S.square().sum()).var()) == pytest.approx(expected, rel=0.35), rho


def test_outlying_dimensions_of_one_residue_fall_into_buckets_of_their_own():
    """Those of trained models are few, fixed and large: at the same place of two blocks they must not meet in every seed."""
    meet = 0
    for seed in range(200):
        matrix = projection(seed, "A", 2048).matrix
        meet += int(matrix[788].abs().argmax() == matrix[1076].abs().argmax())  # 9 blocks apart
    assert 200 / 8 * 0.4 <= meet <= 200 / 8 * 2


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 5, 8, 12, 16, 17, 24, 64])
def test_the_compiled_library_estimates_what_pytorch_does(r, dtype, instructions):
    from fedrot_kernels.native_backend.whole_model import align_average

    for d_in, d_out in ((33, 70), (96, 64), (257, 1030), (5, 2)):
        A, B, A_ref = clients(r, d_in, d_out, dtype=dtype)
        wide = [[x.double() for x in A[0]]], [[x.double() for x in B[0]]]
        for refs in ([x.float() for x in A_ref], None):
            options = {"A_ref": refs, "B_ref": None, "strength": 0.5, "reflections": False, "sketch_seed": 7}
            with torch.no_grad():
                found = align_average(A, B, WEIGHTS, **options, instructions=instructions)
            means = [found.A[0].double()], [found.B[0].double()]
            R = None if refs is None else [x.double() for x in found.R]
            exact = fk.estimate_errors(*wide, R, WEIGHTS, *means, 7)
            scale = exact.numbers[:, 6:]
            own = torch.finfo(dtype).eps if dtype != torch.float32 else 0  # the mean factors that PyTorch sees are rounded
            assert ((found.estimates.numbers - exact.numbers).abs() <= (2e-6 + 4 * own) * scale).all()
            for errors in (0, 2):
                a, b = (float(x.numbers[0, errors]) for x in (found.estimates, exact))
                assert math.sqrt(a) == pytest.approx(math.sqrt(b), rel=1e-4)
            assert torch.allclose(found.estimates.squares, exact.squares, rtol=1e-3, atol=1e-6 * float(scale))


@pytest.mark.parametrize("backend", ["torch", *(["native"] if HERE else [])])
def test_clients_that_agree_lose_nothing(backend):
    A, B, A_ref = clients(8, 100, 60, n=1, dtype=torch.float32)
    same = [A[0] * 5], [B[0] * 5]
    aligned = fk.align_average(*same, [1.0, 2.0, 3.0, 0.0, 1.0], A_ref=A_ref, backend=backend, sketch_seed=1)
    plain = fk.average_factors(*same, [1.0, 2.0, 3.0, 0.0, 1.0], backend=backend, sketch_seed=1)
    for estimates in (aligned.estimates, plain.estimates):
        assert torch.equal(estimates.numbers[:, :4], torch.zeros(1, 4, dtype=torch.float64))
    assert aligned.estimates.numbers[0, 6] == pytest.approx(float((B[0][0] @ A[0][0]).square().sum()), rel=1e-5)


@pytest.mark.parametrize("backend", ["torch", *(["native"] if HERE else [])])
def test_plain_averages_are_those_of_average(backend):
    A, B, _ = clients(4, 50, 70, dtype=torch.float32)
    found = fk.average_factors(A, B, WEIGHTS, backend=backend)
    means, finite = fk.average([*A, *B], WEIGHTS, backend="torch")
    assert found.estimates is None and bool(found.finite) and bool(finite)
    for x, y in zip((*found.A, *found.B), means, strict=True):
        assert torch.allclose(x, y, rtol=0, atol=4 * torch.finfo(torch.float32).eps * float(y.abs().max()))
