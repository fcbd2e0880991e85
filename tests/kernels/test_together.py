"""Alignment in Gram space against dense float64 arithmetic, one adapter at a time."""

from itertools import pairwise

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels import reference
from fedrot_kernels.groupwise import consensus as consensus_module
from fedrot_kernels.groupwise import least_error
from fedrot_kernels.groupwise.consensus import consensus
from fedrot_kernels.groupwise.gram import Grams
from fedrot_kernels.groupwise.together import STRENGTHS

from .spectra import orthogonal

SHAPES = [(4, 33, 20), (4, 9, 64), (1, 7, 5), (8, 40, 24)]
WEIGHTS = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0], dtype=torch.float64)
SHARES = WEIGHTS / WEIGHTS.sum()
N = len(WEIGHTS)
MODES = [
    {"target": "reference", "on": "A"},
    {"target": "reference", "on": "AB", "strength": None},
    {"target": "consensus"},
    {"target": "consensus", "on": "B", "strength": 0.5, "reflections": True},
    {"target": "error"},
    {"target": "error", "reflections": True},
]
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(map(str, mode.values())))


def clients(seed=0, drift=0.5, dtype=torch.float64, shapes=SHAPES, turned=True, n=N):
    """Per adapter A (n, r, d_in), B (n, d_out, r) and a reference: clients near it, each in a basis of its own."""
    generator = torch.Generator().manual_seed(seed)
    A, B, A_ref, B_ref = [], [], [], []
    for r, d_in, d_out in shapes:
        a, b, *drifts = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((r, d_in), (d_out, r), (n, r, d_in), (n, d_out, r))
        )
        Q = orthogonal(n, r, generator)
        Q[..., 0] *= torch.linalg.det(Q).sign()[:, None]
        Q = Q if turned else torch.eye(r, dtype=torch.float64).expand(n, -1, -1)
        A.append((Q.mT @ (a + drift * drifts[0])).to(dtype))
        B.append(((b + drift * drifts[1]) @ Q).to(dtype))
        A_ref.append(a.to(dtype))
        B_ref.append(b.to(dtype))
    return A, B, A_ref, B_ref


def lost(A, B, R):
    """‖Σ wᵢBᵢAᵢ − B̄Ā‖_F of one adapter, by its definition."""
    w = SHARES[:, None, None]
    return torch.linalg.norm((w * B @ A).sum(0) - (w * B @ R).sum(0) @ (w * R.mT @ A).sum(0))


def spread(A, B, R, shares=SHARES):
    """What generalised Procrustes lowers: Σ wᵢ‖RᵢᵀFᵢ − F̄‖², both factors scaled to one size."""
    w, total = shares[:, None, None], 0.0
    for F in (A, B.mT):
        F = R.mT @ F / (w * F.square()).sum().sqrt()
        total += (w * (F - (w * F).sum(0)).square()).sum()
    return total


@pytest.mark.parametrize("uses", [0, 10**6], ids=["factors", "Gram matrices"])
def test_the_error_of_any_rotations_is_that_of_the_definition(uses):
    A, B, *_ = clients()
    same_rank = [0, 1]
    R = orthogonal(2 * N, 4, torch.Generator().manual_seed(1)).view(2, N, 4, 4)
    grams = Grams([A[i] for i in same_rank], [B[i] for i in same_rank], SHARES, uses)
    assert (grams.A.K is None) == (grams.B.K is None) == (uses == 0)
    found = (grams.at(R).error * grams.size).sqrt()
    update = (grams.update * grams.size).sqrt()
    for k, i in enumerate(same_rank):
        torch.testing.assert_close(
            update[k], torch.linalg.norm((SHARES[:, None, None] * B[i] @ A[i]).sum(0)), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(found[k], lost(A[i], B[i], R[k]), rtol=1e-12, atol=0)


def test_one_factor_by_its_gram_matrix_and_the_other_by_itself():
    (A,), (B,), *_ = clients(shapes=[(4, 2000, 4)])
    grams = Grams([A], [B], SHARES, 3)
    assert grams.A.K is not None and grams.B.K is None
    eye = torch.eye(4, dtype=torch.float64).expand(1, N, -1, -1)
    found = (torch.stack([grams.update, grams.at(eye).error]) * grams.size).sqrt().flatten()
    expected = torch.stack([torch.linalg.norm((SHARES[:, None, None] * B @ A).sum(0)), lost(A, B, eye[0])])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_gradient_is_that_of_the_definition():
    (A,), (B,), *_ = clients(shapes=[(4, 33, 20)])
    R = orthogonal(N, 4, torch.Generator().manual_seed(2))
    grams = Grams([A], [B], SHARES, 10**6)
    Z = least_error._gradient(grams, R[None], grams.at(R[None]))[0]
    X = torch.zeros_like(R, requires_grad=True)
    (lost(A, B, R @ torch.linalg.matrix_exp(X - X.mT)) ** 2).backward()
    expected = -2 * SHARES[:, None, None] * (Z - Z.mT) * grams.size
    torch.testing.assert_close(expected, X.grad, rtol=1e-10, atol=1e-10 * float(X.grad.max()))


@pytest.mark.parametrize("uses", [0, 10**6], ids=["factors", "Gram matrices"])
def test_no_sweep_of_the_consensus_raises_the_spread(uses):
    (A,), (B,), *_ = clients(shapes=[(8, 40, 24)])
    grams = Grams([A], [B], SHARES, uses)
    R = torch.eye(8, dtype=torch.float64).expand(1, N, -1, -1)
    spreads = [spread(A, B, R[0])]
    for _ in range(12):
        R = consensus(grams, R, reflections=False, floor=0, sweeps=1)
        spreads.append(spread(A, B, R[0]))
    assert all(after <= before + 1e-12 for before, after in pairwise(spreads))
    assert spreads[-1] < 0.7 * spreads[0]
    best = torch.stack([reference.special_orthogonal(M) for M in _towards_mean(A, B, R[0])])
    # A fixed point: every client is as close as it can come to the others' mean.
    assert spread(A, B, best) > spreads[-1] * (1 - 1e-6)


def _towards_mean(A, B, R, shares=SHARES):
    w, M = shares[:, None, None], 0
    for F in (A, B.mT):
        F = F / (w * F.square()).sum().sqrt()
        M = M + F @ (w * R.mT @ F).sum(0).T
    return M


HARD = [(3, 1, 1.0), (3, 4, 0.3), (10, 8, 2.0), (50, 4, 2.0), (10, 16, 1.5), (4, 64, 0.7)]


def hard_clients(n, r, noise, *, reflections):
    """Eight adapters of one shape: n clients in bases at random, noise of this many times the signal, unequal weights."""
    generator, d = torch.Generator().manual_seed(5), max(64, 2 * r)
    shares = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    Q = orthogonal(8 * n, r, generator)
    if not reflections:
        Q[..., 0] *= torch.linalg.det(Q).sign()[:, None]
    frames = []
    for width in (d, d // 2):
        common = torch.randn(8, 1, r, width, generator=generator, dtype=torch.float64)
        F = common + noise * torch.randn(8, n, r, width, generator=generator, dtype=torch.float64)
        frames.append(Q.view(8, n, r, r).mT @ F)
    return frames[0], frames[1].mT.contiguous(), shares / shares.sum()


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize(("n", "r", "noise"), HARD)
def test_the_consensus_has_converged_on_hard_data(n, r, noise, reflections, monkeypatch):
    A, B, shares = hard_clients(n, r, noise, reflections=reflections)
    grams = Grams(A, B, shares, 10**6)
    start = torch.eye(r, dtype=torch.float64).expand(8, n, -1, -1)
    options = {"reflections": reflections, "floor": 0}
    found = consensus(grams, start, **options)
    monkeypatch.setattr(consensus_module, "CONSENSUS", 0)
    longer = consensus(grams, start, **options, sweeps=200 if r > 16 else 2000)
    for i in range(8):
        reached, best = (float(spread(A[i], B[i], R[i], shares)) for R in (found, longer))
        assert reached <= best * (1 + 1e-6) + 1e-12


def test_what_an_adapter_becomes_does_not_depend_on_the_others():
    A, B, shares = hard_clients(10, 8, 2.0, reflections=False)
    start = torch.eye(8, dtype=torch.float64).expand(8, 10, -1, -1)
    options = {"reflections": False, "floor": 0}
    together = consensus(Grams(A, B, shares, 10**6), start, **options)
    for i in (0, 5):
        alone = consensus(Grams(A[i : i + 1], B[i : i + 1], shares, 10**6), start[:1], **options)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-9)


def test_one_client_and_clients_without_weight():
    A, B, shares = hard_clients(4, 8, 0.3, reflections=False)
    start = orthogonal(32, 8, torch.Generator().manual_seed(3))
    start[..., 0] *= torch.linalg.det(start).sign()[:, None]
    start, shares = start.view(8, 4, 8, 8), torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    R = consensus(Grams(A, B, shares, 10**6), start, reflections=False, floor=0)
    torch.testing.assert_close(R[:, 1], start[:, 1], rtol=0, atol=1e-9)  # nothing to turn towards
    for i in range(8):
        best = torch.stack([reference.special_orthogonal(M) for M in _towards_mean(A[i], B[i], R[i], shares)])
        torch.testing.assert_close(R[i], best, rtol=0, atol=1e-6)  # the others stand as near to it as they can


@pytest.mark.parametrize("drift", [0.3, 1e-2, 1e-3])
def test_float32_keeps_the_digits_of_small_errors(drift):
    A, B, A_ref, B_ref = clients(drift=drift, dtype=torch.float32)
    found = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref)
    wide = [[x.double() for x in factor] for factor in (A, B)]
    exact = fk.align_together(*wide, WEIGHTS, A_ref=[x.double() for x in A_ref], B_ref=[x.double() for x in B_ref])
    # Without the centre it would be up to 2e-8.
    rounding = 5e-9 * exact.update_norm
    torch.testing.assert_close(found.update_norm, exact.update_norm, rtol=1e-6, atol=0)
    for i, (a, b) in enumerate(zip(*wide, strict=True)):
        error = lost(a, b, found.R[i].double())
        assert abs(float(found.error[i] - error)) <= 1e-5 * float(error) + float(rounding[i])
        assert float(error) <= (1 + 1e-5) * float(exact.error[i]) + float(rounding[i])


@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means_matrices_and_errors_belong_together(mode, dtype, cpu_backend):
    A, B, A_ref, B_ref = clients(dtype=dtype)
    found = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref, **mode)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    eps, w = torch.finfo(working).eps, SHARES[:, None, None]
    assert bool(found.finite) and found.residual.shape == (len(A), N)
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        a, b, R = (x.double() for x in (a, b, found.R[i]))
        assert found.R[i].dtype == working and found.A[i].dtype == found.B[i].dtype == dtype
        r = R.shape[-1]
        assert float((R.mT @ R - torch.eye(r)).abs().max()) <= 8 * r * eps
        assert mode.get("reflections") or bool((torch.linalg.det(R) > 0).all())
        for mean, expected in ((found.A[i], (w * R.mT @ a).sum(0)), (found.B[i], (w * b @ R).sum(0))):
            bound = (torch.finfo(dtype).eps / 2 + 4 * N * r * eps) * float(expected.abs().max())
            assert float((mean.double() - expected).abs().max()) <= bound
        if found.error is None:
            assert cpu_backend == "native" and mode["target"] == "consensus" and dtype != torch.float64
            continue
        norm = torch.linalg.norm((w * b @ a).sum(0))
        # The least error has Gram matrices of float32, whose rounding is that of the factors.
        exact = dtype == torch.float64 or mode["target"] != "error"
        torch.testing.assert_close(found.update_norm[i], norm, rtol=1e-12 if exact else 1e-6, atol=0)
        # R is rounded to the working dtype after the error is computed, and the squared error to the squared update's eps.
        error = lost(a, b, R)
        bound = 4 * r * eps * float(norm) + 8 * torch.finfo(torch.float64).eps * float(norm**2 / error)
        torch.testing.assert_close(found.error[i], error, rtol=0, atol=bound)
        plain = lost(a, b, torch.eye(r, dtype=torch.float64))
        torch.testing.assert_close(found.plain_error[i], plain, rtol=1e-9 if exact else 1e-5, atol=0)


@every_mode
def test_it_does_not_depend_on_scale_and_repeats_to_the_bit(mode):
    A, B, A_ref, B_ref = clients()
    first = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref, **mode)
    again = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref, **mode)
    scaled = [[1e-20 * x for x in A], [1e25 * x for x in B], WEIGHTS * 1e9]
    refs = {"A_ref": [1e-20 * x for x in A_ref], "B_ref": [1e25 * x for x in B_ref]}
    other = fk.align_together(*scaled, **refs, **mode)
    for i in range(len(A)):
        assert torch.equal(first.A[i], again.A[i]) and torch.equal(first.B[i], again.B[i])
        # What decides between two steps is a comparison of rounded errors, so that descents may part by more than rounding.
        tolerance = 1e-3 if mode["target"] == "error" else 1e-6
        torch.testing.assert_close(
            other.error[i], 1e5 * first.error[i], rtol=tolerance, atol=1e-9 * float(first.update_norm[i])
        )


@pytest.mark.parametrize("scale", [1e-22, 1e20])
def test_float32_of_any_scale(scale):
    A, B, A_ref, B_ref = clients(dtype=torch.float32)
    first = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref)
    A, A_ref = ([scale * x for x in factors] for factors in (A, A_ref))
    scaled = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref)
    torch.testing.assert_close(scaled.error, scale * first.error, rtol=1e-3, atol=1e-6 * scale * float(first.update_norm[2]))


def test_clients_that_differ_by_rotations_only_lose_nothing():
    for mode in ({"target": "consensus"}, {"target": "error"}):
        A, B, A_ref, B_ref = clients(drift=0)
        found = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref, **mode)
        for i in range(len(A)):
            # Finally rotated towards the reference, which they all are.
            torch.testing.assert_close(found.A[i], A_ref[i], rtol=0, atol=1e-9)
            torch.testing.assert_close(found.B[i], B_ref[i], rtol=0, atol=1e-9)


def test_errors_fall_from_consensus_to_least_error():
    A, B, A_ref, B_ref = clients(drift=1.0, shapes=[(8, 40, 24), (8, 30, 50), (4, 20, 20)])
    options = {"A_ref": A_ref, "B_ref": B_ref}
    plain = torch.stack([lost(a, b, torch.eye(a.shape[1], dtype=torch.float64)) for a, b in zip(A, B, strict=True)])
    together = fk.align_together(A, B, WEIGHTS, **options, target="consensus").error
    rotations = fk.align_together(A, B, WEIGHTS, **options, target="error").error
    assert bool((rotations <= torch.minimum(together, plain)).all())
    assert float((rotations / together).mean()) < 0.97


def test_rotations_of_least_error_are_a_minimum():
    """Among rotations nearby, drawn at random, none is better."""
    (A,), (B,), *_ = clients(shapes=[(4, 33, 20)], turned=False)
    grams = Grams([A], [B], SHARES, 10**6)
    R = torch.eye(4, dtype=torch.float64).expand(1, N, -1, -1)
    for _ in range(8):
        R = least_error.least_error_rotations(grams, R)
    least = float(lost(A, B, R[0]))
    generator = torch.Generator().manual_seed(0)
    for size in (0.3, 0.03, 0.003):
        for _ in range(50):
            X = size * torch.randn(N, 4, 4, dtype=torch.float64, generator=generator)
            near = R[0] @ torch.linalg.matrix_exp(X - X.mT)
            assert float(lost(A, B, near)) > least * (1 - 1e-9)


def test_where_clients_agree_already_least_error_begins_with_them_as_they_came():
    A, B, A_ref, B_ref = clients(drift=0.01, turned=False)
    found = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref)
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        eye = torch.eye(a.shape[1], dtype=torch.float64)
        # Squared errors are known to the rounding of the squared update.
        rounding = 1e-15 * float(found.update_norm[i]) ** 2
        assert float(found.error[i]) ** 2 <= float(lost(a, b, eye)) ** 2 + rounding


@pytest.mark.parametrize("on", ["A", "AB"])
def test_the_strength_chosen_is_that_of_the_least_error(on):
    A, B, A_ref, B_ref = clients(drift=0.8)
    options = {"A_ref": A_ref, "B_ref": B_ref, "target": "reference", "on": on}
    by_strength = torch.stack([fk.align_together(A, B, WEIGHTS, **options, strength=s).error for s in STRENGTHS])
    found = fk.align_together(A, B, WEIGHTS, **options, strength=None)
    assert found.strengths.unique().numel() > 1, "adapters that all choose alike would not tell that each has its own"
    for i, strength in enumerate(found.strengths.tolist()):
        errors = by_strength[:, i]
        torch.testing.assert_close(found.error[i], errors[STRENGTHS.index(strength)], rtol=1e-9, atol=0)
        good = [s for s, e in zip(STRENGTHS, errors.tolist(), strict=True) if e <= 1.01 * float(errors.min())]
        assert strength == min(good, key=lambda s: (abs(s - 0.5), s))


@pytest.mark.parametrize(
    "mode", [m for m in MODES if m.get("strength", 1) == 1], ids=lambda m: " ".join(map(str, m.values()))
)
def test_the_result_follows_the_basis_of_the_reference(mode):
    """A reference in another basis gives the same means in that basis (half a rotation depends on where clients stand)."""
    A, B, A_ref, B_ref = clients(drift=0.2)
    Q = [fk.special_orthogonal(q, q) for a in A_ref for q in orthogonal(1, len(a), torch.Generator().manual_seed(len(a)))]
    here = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref, **mode)
    turned = {
        "A_ref": [q.T @ a for q, a in zip(Q, A_ref, strict=True)],
        "B_ref": [b @ q for q, b in zip(Q, B_ref, strict=True)],
    }
    there = fk.align_together(A, B, WEIGHTS, **turned, **mode)
    for i, q in enumerate(Q):
        # Not to rounding: what begins in another basis ends its steps elsewhere on the way to the same place.
        distance = torch.linalg.norm(there.A[i] - q.T @ here.A[i]) / torch.linalg.norm(here.A[i])
        assert float(distance) < 0.02


def test_what_is_zero_or_not_finite():
    A, B, A_ref, B_ref = clients()
    nothing = [torch.zeros_like(b) for b in B], [torch.zeros_like(b) for b in B_ref]
    for mode in MODES:
        found = fk.align_together(A, nothing[0], WEIGHTS, A_ref=A_ref, B_ref=nothing[1], **mode)
        assert bool(found.finite) and not found.error.any() and not found.update_norm.any()
        assert all(not b.any() for b in found.B)
        B_bad = [b.clone() for b in B]
        B_bad[1][2, 0, 0] = torch.inf
        found = fk.align_together(A, B_bad, WEIGHTS, A_ref=A_ref, B_ref=B_ref, **mode)
        assert not bool(found.finite)
        assert all(bool(found.A[i].isfinite().all() and found.B[i].isfinite().all()) for i in (0, 2, 3))


def test_options_that_do_not_exist():
    A, B, A_ref, B_ref = clients()
    for options, named in (
        ({"strength": 2.0}, "strength"),
        ({"target": "errors"}, "target must be one of"),
        ({"on": ""}, "on must be one of"),
    ):
        with pytest.raises(ValueError, match=named):
            fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref, **options)
    with pytest.raises(ValueError, match="adapter 1: A_ref"):
        fk.align_together(A, B, WEIGHTS, A_ref=[A_ref[0], A_ref[0], *A_ref[2:]], B_ref=B_ref)
