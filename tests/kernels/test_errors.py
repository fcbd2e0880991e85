"""Measured aggregation errors against their definition in float64: every instruction set, rank and dtype, both centres, what
the compiled library leaves to PyTorch, and what is zero."""

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels import errors as module
from fedrot_kernels.native_backend.errors import measure_errors as native

from .spectra import orthogonal
from .test_native import HERE, SETS, inside

needs_library = pytest.mark.skipif(HERE is None, reason="the compiled library is not built, or switched off")
EPS = torch.finfo(torch.float32).eps
SAME, OWN, TURNED = "bases shared", "bases of their own", "turned apart"


def clients(r, d_in, d_out, n, bases, drift=0.1, dtype=torch.float32, seed=0, exact=False):
    """A and B of n clients that differ by a drift, their rotations, and their shares.

    The clients share a basis, have bases of their own that the rotations undo, or are turned apart by rotations at random;
    float32 holds the rotations exactly if they are to be permutations with signs.
    """
    generator = torch.Generator().manual_seed(seed)
    a, b, drift_A, drift_B, w = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((r, d_in), (d_out, r), (n, r, d_in), (n, d_out, r), (n,))
    )
    Q = orthogonal(n, r, generator)
    if exact:
        order = torch.rand(n, r, generator=generator).argsort(1)
        Q = torch.eye(r, dtype=torch.float64)[order] * torch.randn(n, r, 1, generator=generator).sign()
    bases_given = Q if bases == OWN else torch.eye(r, dtype=torch.float64).expand(n, -1, -1)
    A = (bases_given @ (a + drift * drift_A)).to(dtype)
    B = ((b + drift * drift_B) @ bases_given.mT).to(dtype)
    weights = w.abs() + 0.1
    if n > 1:
        weights[-1] = 0
    return list(A), list(B), None if bases == SAME else Q.float(), weights / weights.sum()


def by_definition(A, B, R, shares):
    """The error of rotated factors, the update's norm and the plain error in float64, and how far rounding may move each."""
    A, B, w = torch.stack(list(A)).double(), torch.stack(list(B)).double(), shares.double()[:, None, None]
    update, eye = (w * B @ A).sum(0), torch.eye(A.shape[1], dtype=torch.float64).expand(len(A), -1, -1)
    found, spreads = [], []
    for turn in (eye if R is None else R.double(), eye):
        a, b = turn.mT @ A, B @ turn
        mean_A, mean_B = (w * a).sum(0), (w * b).sum(0)
        found.append(torch.linalg.norm(update - mean_B @ mean_A))
        spreads.append([(w * (x - mean).square()).sum().sqrt() for x, mean in ((a, mean_A), (b, mean_B))])
    sizes = [(w * x.square()).sum().sqrt() for x in (A, B)]
    bounds = []
    for error, (on_A, on_B) in zip(found, spreads, strict=True):
        # Rounding D = F − R C moves each difference by a few eps of F, and that of R the product of the means. Sums of 32
        # products in float32, then of 16 lanes, move the square by 40 of their eps.
        skewed = 0.0 if R is None else torch.linalg.matrix_norm(R.double().mT @ R.double() - eye, ord=2).max()
        moved = 4 * EPS * (sizes[0] * on_B + sizes[1] * on_A) + (2 * skewed + (4 * EPS) ** 2) * sizes[0] * sizes[1]
        square = 40 * EPS * (on_A * on_B) ** 2
        bounds.append(moved + torch.minimum(square / error.clamp(min=1e-300), square.sqrt()))
    norm = torch.linalg.norm(update)
    return torch.stack([found[0], norm, found[1]]), torch.stack([bounds[0], 100 * EPS * sizes[0] * sizes[1], bounds[1]])


def check(found, A, B, R, shares):
    expected, bound = by_definition(A, B, R, shares)
    assert ((found - expected).abs() <= bound).all(), (found, expected, bound)
    return expected


@needs_library
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("bases", [SAME, OWN, TURNED])
@pytest.mark.parametrize("n", [1, 2, 3, 9])
@pytest.mark.parametrize("r", [*range(1, 10), 12, 16, 17, 32, 33, 64])
def test_every_rank_on_every_instruction_set(r, n, bases, instructions):
    """Odd widths over several panels, unaligned memory between NaNs, a client without weight."""
    A, B, R, shares = clients(r, 3 * r + 5, 1030 if r <= 16 else 70, n, bases, seed=r)
    A, B = ([inside(x, i % 5 + 1) for i, x in enumerate(factor)] for factor in (A, B))
    (found,), left = native([A], [B], None if R is None else [R], shares.tolist(), instructions)
    expected = check(found, A, B, R, shares)
    assert not left
    if n > 2:  # otherwise a single client has all the weight
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bases", [SAME, OWN, TURNED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_and_backend(dtype, bases, cpu_backend):
    groups = [clients(r, 40, d_out, 5, bases, dtype=dtype, seed=r) for r, d_out in ((4, 33), (8, 90), (4, 33), (64, 10))]
    A, B, R, shares = zip(*groups, strict=True)
    found = fk.measure_errors(A, B, None if bases == SAME else R, shares[0])
    assert found.shape == (4, 3) and found.dtype == torch.float64
    for i, group in enumerate(groups):
        expected = check(found[i], *group[:3], shares[0])
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=0)
    wanting = [[torch.nn.Parameter(x) for x in factors] for factors in A]
    assert torch.equal(fk.measure_errors(wanting, B, None if bases == SAME else R, shares[0]), found)


@pytest.mark.parametrize("bases", [SAME, OWN, TURNED])
@pytest.mark.parametrize("drift", [1e-2, 1e-3, 1e-4, 0.0])
def test_small_errors_keep_their_digits(drift, bases, cpu_backend):
    """Where clients nearly agree, rotated or as they are, their differences are taken before products."""
    A, B, R, shares = clients(4, 600, 500, 7, bases, drift, exact=True)
    (found,) = fk.measure_errors([A], [B], None if R is None else [R], shares)
    expected = check(found, A, B, R, shares)
    if drift >= 1e-3:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    if bases == SAME and not drift and cpu_backend == "native":
        assert found[0] == found[2] == 0


@needs_library
@pytest.mark.parametrize("instructions", SETS)
def test_panels_of_one_adapter_may_take_either_centre(instructions):
    """The first 600 columns of A agree as they are, the others when they are rotated; B agrees as it is, or rotated."""
    A, rotated_B, R, shares = clients(5, 1300, 1100, 6, OWN, 0.05)
    plain_A, plain_B, *_ = clients(5, 1300, 1100, 6, SAME, 0.05)
    A = [torch.cat([x[:, :600], y[:, 600:]], dim=1) for x, y in zip(plain_A, A, strict=True)]
    for B in (plain_B, rotated_B):
        (found,), left = native([A], [B], [R], shares.tolist(), instructions)
        torch.testing.assert_close(found, check(found, A, B, R, shares), rtol=1e-5, atol=0)
        assert not left


@needs_library
def test_what_the_library_leaves_is_pytorchs_in_float64():
    """Partial isometries, factors whose squares leave the range of float32, and those that are not finite."""
    groups = [list(clients(4, 33, 40, 3, OWN, seed=i)) for i in range(6)]
    for x in (*groups[1][0], *(b.T for b in groups[1][1])):
        x[3] = 0
    groups[1][2] = torch.block_diag(torch.eye(3), torch.zeros(1, 1)).expand(3, -1, -1)
    groups[2][0] = [1e25 * x for x in groups[2][0]]
    groups[3][1] = [1e-22 * x for x in groups[3][1]]
    groups[4][1][1][2, 2] = torch.nan
    A, B, R, shares = zip(*groups, strict=True)
    left = native(A, B, R, shares[0])[1]
    found = fk.measure_errors(A, B, R, shares[0])
    assert left == [1, 2, 3, 4] and found[4].isnan().all()
    for i in (0, 1, 2, 3, 5):
        scale = {2: 1e25, 3: 1e-22}.get(i, 1.0)
        expected, bound = by_definition(*groups[i][:3], shares[0])
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=float(bound.min()) * scale)


@needs_library
def test_more_rows_than_a_dense_product_has_are_pytorchs(monkeypatch):
    A, B, R, shares = clients(4, 24, 20, 30, OWN)
    wide = clients(4, 200, 300, 30, OWN)
    calls = []
    monkeypatch.setattr(module, "_by_torch", lambda *args: calls.append(args) or torch.ones(len(args[0]), 3).double())
    (first, second) = fk.measure_errors([A, wide[0]], [B, wide[1]], [R, wide[2]], shares)
    assert first.tolist() == [1, 1, 1] and len(calls) == 1 and calls[0][0][0] is A
    check(second, *wide[:3], shares)


@pytest.mark.parametrize("bases", [SAME, OWN])
def test_what_is_zero(bases, cpu_backend):
    A, B, R, shares = clients(4, 33, 40, 3, bases)
    zero = [torch.zeros_like(b) for b in B]
    R = None if R is None else [R]
    assert not fk.measure_errors([A], [zero], R, shares).any()
    alone = fk.measure_errors([A], [B], R, [0, 1, 0])[0]
    assert alone[0] <= 1e-6 * alone[1] and alone[2] <= 1e-6 * alone[1]
    same = fk.measure_errors([A[:1] * 3], [B[:1] * 3], None, shares)[0]
    assert same[0] == same[2] <= (0 if cpu_backend == "native" else 1e-6 * same[1]) and same[1] > 0


@needs_library
@pytest.mark.parametrize("instructions", SETS)
def test_the_number_of_threads_changes_no_bit(instructions, monkeypatch):
    groups = [clients(5, 70 + i, 40, 6, OWN, seed=i) for i in range(8)]
    A, B, R, shares = zip(*groups, strict=True)
    results = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(native(A, B, R, shares[0], instructions)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_inputs_that_do_not_fit():
    A, B, R, shares = clients(4, 33, 40, 3, OWN)
    for arguments, named in (
        (([A], [B], [R[:2]], shares), "adapter 0: expected rotations"),
        (([A], [[b[:, :3] for b in B]], [R], shares), "adapter 0"),
        (([A], [B], [R], [1, 2]), "weights must be 3 finite numbers"),
    ):
        with pytest.raises(ValueError, match=named):
            fk.measure_errors(*arguments)
    with pytest.raises(TypeError, match="floating-point"):
        fk.measure_errors([[a.int() for a in A]], [[b.int() for b in B]], None, shares)
