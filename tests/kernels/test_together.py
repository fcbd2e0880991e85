"""Alignment in Gram space against dense float64 arithmetic, one adapter at a time."""

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels.groupwise.together import STRENGTHS

from .groups import SHARES, WEIGHTS, N, clients, lost
from .spectra import orthogonal

MODES = [
    {"target": "reference", "on": "A"},
    {"target": "reference", "on": "AB", "strength": None},
    {"target": "consensus"},
    {"target": "consensus", "on": "B", "strength": 0.5, "reflections": True},
    {"target": "error"},
    {"target": "error", "reflections": True},
]
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(map(str, mode.values())))


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
