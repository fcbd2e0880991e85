"""The consensus of the compiled library against PyTorch's in float64: every instruction set, ranks, dtypes, threads, what it
leaves to PyTorch, and the errors that it estimates."""

import functools

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels.groupwise import consensus as torch_consensus
from fedrot_kernels.native_backend import consensus as native_consensus
from fedrot_kernels.native_backend.consensus import consensus_average

from .groups import HARD, clients, hard_clients, spread
from .test_native import HERE, SETS, inside

pytestmark = pytest.mark.skipif(HERE is None, reason="the compiled library is not built, or switched off")
BY_GRAM, BY_FACTORS = 5, 15  # numbers of clients whose sweeps run on a Gram matrix, and on the factors


def near_a_reference(r, widths, n, dtype=torch.float32, seed=0):
    """Per adapter A, B and references: n clients near a reference, in bases of their own."""
    A, B, A_ref, B_ref = clients(seed, 0.3, dtype, [(r, *w) for w in widths], n=n)
    return list(map(list, A)), list(map(list, B)), A_ref, B_ref


def exactly(A, B, weights, *, A_ref, B_ref, **options):
    """PyTorch's, in float64."""
    A, B = ([[x.double() for x in of_adapter] for of_adapter in factors] for factors in (A, B))
    refs = {"A_ref": [x.double() for x in A_ref], "B_ref": [x.double() for x in B_ref]}
    return fk.align_together(A, B, weights, **refs, **options, target="consensus")


@pytest.fixture
def to_the_end(monkeypatch):
    """Sweep until float32 cannot tell a gain, so that both find the same rotations."""
    for module in (torch_consensus, native_consensus):
        monkeypatch.setattr(module, "CONSENSUS", 1e-14)


@functools.lru_cache(maxsize=1)  # the same for every instruction set, and by far the most of the work
def given_and_expected(r, n):
    """Two adapters of a rank, the clients' weights, and the exact result."""
    widths = [(2 * r + 3, 3 * r + 5), (1040, 4 * r)] if r <= 16 else [(2 * r + 3, 3 * r + 5)]
    A, B, A_ref, B_ref = near_a_reference(r, widths, n, seed=r)
    weights = [0.0 if i == 1 else 1.0 + i % 3 for i in range(n)]
    return A, B, A_ref, B_ref, weights, exactly(A, B, weights, A_ref=A_ref, B_ref=B_ref)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("n", [1, 2, BY_GRAM, BY_FACTORS])
@pytest.mark.parametrize("r", [*range(1, 10), 12, 16, 17, 24, 33, 64, 128])
def test_every_rank_on_every_instruction_set(r, n, instructions, to_the_end):
    """Odd widths, unaligned memory between NaNs: rotations to those of float64, means to rounding of those by them."""
    A, B, A_ref, B_ref, weights, exact = given_and_expected(r, n)
    placed = [[[inside(x, i % 5 + 1) for i, x in enumerate(of_adapter)] for of_adapter in factors] for factors in (A, B)]
    refs = {"A_ref": [inside(x, 1) for x in A_ref], "B_ref": [inside(x, 3) for x in B_ref]}
    options = {"on": "AB", "reflections": False, "strength": 1.0}
    found, left = consensus_average(*placed, weights, **refs, **options, instructions=instructions)
    assert not left and bool(found.finite) and found.residual.max() <= 2e-6
    w = (torch.tensor(weights, dtype=torch.float64) / sum(weights))[:, None, None]
    for i in range(len(A)):
        R, a, b = found.R[i].double(), torch.stack(A[i]).double(), torch.stack(B[i]).double()
        assert (R - exact.R[i]).abs().max() <= 3e-4
        for mean, expected in ((found.A[i], (w * R.mT @ a).sum(0)), (found.B[i], (w * b @ R).sum(0))):
            assert (mean - expected).abs().max() <= 1e-6 * r**0.5 * expected.abs().max()


@pytest.mark.parametrize("n", [BY_GRAM, BY_FACTORS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{"on": "A"}, {"on": "B"}, {"strength": 0.3}, {"reflections": True}, {"on": "A", "strength": 0.7, "reflections": True}],
    ids=lambda options: " ".join(map(str, options.values())),
)
@pytest.mark.parametrize("r", [4, 5, 16])
def test_every_option_and_dtype(r, options, dtype, n, to_the_end):
    A, B, A_ref, B_ref = near_a_reference(r, [(70, 45), (33, 130)], n, dtype)
    if options.get("reflections"):
        for a, b in zip(A, B, strict=True):
            a[0], b[0] = a[0].flip(0).contiguous(), b[0].flip(1).contiguous()
    weights = [1.0 + i % 3 for i in range(n)]
    refs = {"A_ref": A_ref, "B_ref": B_ref}
    defaults = {"on": "AB", "strength": 1.0, "reflections": False}
    found, left = consensus_average(A, B, weights, **refs, **(defaults | options))
    exact = exactly(A, B, weights, **refs, **options)
    assert not left
    for i in range(len(A)):
        assert found.A[i].dtype == found.B[i].dtype == dtype
        assert (found.R[i] - exact.R[i]).abs().max() <= 3e-4
        for mean, expected in ((found.A[i], exact.A[i]), (found.B[i], exact.B[i])):
            assert (mean - expected).abs().max() <= (3e-4 + torch.finfo(dtype).eps) * expected.abs().max()


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize(("n", "r", "noise"), [*HARD, (50, 8, 1.5), (14, 8, 3.0)])
def test_it_has_converged_on_hard_data(n, r, noise, reflections, monkeypatch):
    A, B, shares = (x.float() for x in hard_clients(n, r, noise, reflections=reflections))
    A, B = ([list(x) for x in factors] for factors in (A, B))
    refs = {"A_ref": [a[0] for a in A], "B_ref": [b[0] for b in B]}
    options = {"on": "AB", "reflections": reflections, "strength": 1.0}
    found, left = consensus_average(A, B, shares, **refs, **options)
    monkeypatch.setattr(native_consensus, "CONSENSUS", 0)
    monkeypatch.setattr(native_consensus, "CONSENSUS_SWEEPS", 1000)
    longer, _ = consensus_average(A, B, shares, **refs, **options)
    assert not left
    for i in range(len(A)):
        a, b, w = torch.stack(A[i]).double(), torch.stack(B[i]).double(), shares.double() / shares.double().sum()
        reached, best = (float(spread(a, b, R[i].double(), w)) for R in (found.R, longer.R))
        assert reached <= best * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("instructions", SETS)
def test_the_number_of_threads_changes_no_bit(instructions, monkeypatch):
    for n in (BY_GRAM, BY_FACTORS):
        A, B, A_ref, B_ref = near_a_reference(5, [(33, 20), (70, 40)] * 4, n)
        results = []
        for threads in (1, 2, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            options = {"on": "AB", "reflections": False, "strength": 0.7, "sketch_seed": 1, "instructions": instructions}
            found, left = consensus_average(A, B, [1.0] * n, A_ref=A_ref, B_ref=B_ref, **options)
            assert not left
            results.append(found)
        for other in results[1:]:
            for x, y in zip(results[0].A + results[0].B + results[0].R, other.A + other.B + other.R, strict=True):
                assert torch.equal(x, y)
            assert torch.equal(results[0].estimates.numbers, other.estimates.numbers)


@pytest.mark.parametrize("n", [BY_GRAM, BY_FACTORS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clients_that_differ_by_rotations_only_come_back(n, dtype):
    A, B, A_ref, B_ref = clients(0, 0.0, torch.float64, [(4, 33, 20), (5, 40, 24), (16, 40, 90)], n=n)
    A, B = ([list(x.to(dtype)) for x in factors] for factors in (A, B))
    found = fk.align_together(A, B, [1.0] * n, A_ref=A_ref, B_ref=B_ref, target="consensus")
    assert found.error is None  # the library's
    for i in range(len(A)):
        rounding = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        for mean, ref in ((found.A[i], A_ref[i]), (found.B[i], B_ref[i])):
            assert (mean.double() - ref).abs().max() <= rounding * ref.abs().max()


@pytest.mark.parametrize("n", [BY_GRAM, BY_FACTORS])
def test_what_float32_does_not_find_is_pytorchs(n):
    """An ill-conditioned adapter, one that float32 products would overflow, and one that is not finite."""
    A, B, A_ref, B_ref = near_a_reference(4, [(33, 20)] * 5, n)
    for x in (*A[1], A_ref[1]):
        x[3] = 1e-6 * x[2]
    for x in (*B[1], B_ref[1]):
        x[:, 3] = 1e-6 * x[:, 2]
    A[2], A_ref[2] = [1e20 * x for x in A[2]], 1e20 * A_ref[2]
    A[3][2][0, 0] = torch.inf
    weights, refs = [1.0] * n, {"A_ref": A_ref, "B_ref": B_ref}
    options = {"on": "AB", "reflections": False, "strength": 1.0}
    assert consensus_average(A, B, weights, **refs, **options)[1] == [1, 2, 3]
    found = fk.align_together(A, B, weights, **refs, target="consensus", sketch_seed=3)
    given, references = (A[1:4], B[1:4]), {"A_ref": A_ref[1:4], "B_ref": B_ref[1:4]}
    plain = fk.align_together(*given, weights, **references, target="consensus", backend="torch")
    assert found.error is None and plain.error is not None and not bool(found.finite) and not bool(plain.finite)
    for i in range(3):
        for x, y in ((found.A, plain.A), (found.B, plain.B), (found.R, plain.R), (found.residual, plain.residual)):
            torch.testing.assert_close(x[i + 1], y[i], rtol=0, atol=0, equal_nan=True)
    sound = [0, 1, 4]
    A, B, A_ref, B_ref = ([x[i] for i in sound] for x in (A, B, A_ref, B_ref))
    found = fk.align_together(A, B, weights, A_ref=A_ref, B_ref=B_ref, target="consensus", sketch_seed=3)
    assert bool(found.finite)
    expected = fk.estimate_errors(A, B, found.R, weights, found.A, found.B, 3)
    torch.testing.assert_close(found.estimates.numbers, expected.numbers, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.estimates.squares, expected.squares, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [BY_GRAM, BY_FACTORS])
def test_what_is_zero(n):
    A, B, A_ref, B_ref = near_a_reference(4, [(33, 20)] * 4, n)
    for x in (*B[1], B_ref[1], B_ref[2], *A[3], A_ref[3], *B[3], B_ref[3], A[0][0], B[0][0]):
        x.zero_()
    weights, refs = [1.0] * n, {"A_ref": A_ref, "B_ref": B_ref}
    found = fk.align_together(A, B, weights, **refs, target="consensus")
    plain = exactly(A, B, weights, **refs)
    assert found.error is None and bool(found.finite) and not found.B[1].any() and not found.A[3].any()
    assert torch.equal(found.R[3], torch.eye(4).expand(n, 4, 4))
    for i in range(4):
        torch.testing.assert_close(found.A[i].double(), plain.A[i], rtol=0, atol=1e-3)
        torch.testing.assert_close(found.B[i].double(), plain.B[i], rtol=0, atol=1e-3)


def test_strengths_that_pytorch_applies_and_backends():
    A, B, A_ref, B_ref = near_a_reference(4, [(33, 20)], 3)
    refs = {"A_ref": A_ref, "B_ref": B_ref, "target": "consensus"}
    for strength in (0.0, None):
        assert fk.align_together(A, B, [1, 1, 1], **refs, strength=strength).error is not None
    native = fk.align_together(A, B, [1, 1, 1], **refs, backend="native")
    assert native.error is None and torch.equal(native.strengths, torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="the compiled library takes float16, bfloat16 and float32"):
        exactly(A, B, [1, 1, 1], A_ref=A_ref, B_ref=B_ref, backend="native")
