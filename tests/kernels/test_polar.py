"""Rotations in float32 and float64 against the definitions, over the whole grid of ranks and spectra."""

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels import reference

from .spectra import RANKS, orthogonal, orthogonality, procrustes_gap, singular_values, with_singular_values

BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("r", RANKS)
def test_polar_is_orthogonal_and_optimal(r, dtype):
    M = with_singular_values(singular_values(r), seed=r).to(dtype)
    R = fk.polar(M)
    assert R.dtype == dtype and R.shape == M.shape
    assert orthogonality(R) <= BOUND[dtype]
    assert procrustes_gap(M, R) <= 2e-6


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1.0, 1e9, 1e18])
def test_polar_does_not_depend_on_the_scale(scale):
    M = with_singular_values(singular_values(8), seed=0).float()
    R = fk.polar(M * scale)
    assert orthogonality(R) <= 1e-6
    assert procrustes_gap(M * scale, R) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_gives_a_float32_rotation(dtype):
    M = torch.randn(20, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    R = fk.polar(M)
    assert R.dtype == torch.float32 and torch.equal(R, fk.polar(M.float()))


@pytest.mark.parametrize("dtype", BOUND)
def test_polar_agrees_with_the_svd_where_the_factor_is_determined(dtype):
    M = with_singular_values(singular_values(12)[:8], seed=3)  # condition numbers 1 and 3
    expected = torch.stack([reference.polar(m) for m in M])
    lapack = torch.stack([reference.polar(m) for m in M.to(dtype)]).double()
    error, theirs = (fk.polar(M.to(dtype)).double() - expected).abs().max(), (lapack - expected).abs().max()
    assert error <= theirs + M.shape[-1] * torch.finfo(dtype).eps  # what one product of two such matrices loses


def test_float64_is_exact_to_rounding_at_any_condition_number():
    """The error of a polar factor is rounding over the smallest singular value, for the SVD as for us."""
    for kappa in (1e3, 1e6, 1e9, 3e10, 1e12):
        M = with_singular_values(torch.tensor([[1.0, 0.5, 1 / kappa]]).double().expand(20, 3), seed=7)
        expected = torch.stack([reference.polar(m) for m in M])
        assert (fk.polar(M) - expected).abs().max() <= 30 * kappa * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("r", [2, 5, 9, 16, 64, 128])
def test_nilpotent_matrices(r):
    M = torch.diag(torch.ones(r - 1), 1)
    R = fk.polar(M)
    assert orthogonality(R) <= 1e-6 and procrustes_gap(M, R) <= 2e-6
    assert orthogonality(fk.polar(torch.triu(torch.ones(r, r), 1))) <= 1e-6


def test_directions_without_information_do_not_rotate():
    assert torch.equal(fk.polar(torch.zeros(3, 4, 4)), torch.eye(4).expand(3, 4, 4))
    M = torch.zeros(6, 6)
    M[:2, :2] = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    expected = torch.eye(6)
    expected[:2, :2] = M[:2, :2]
    torch.testing.assert_close(fk.polar(M), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(reference.polar(M.double()), expected.double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_matrix_leaves_the_others_untouched(bad):
    M = with_singular_values(singular_values(8), seed=1).float()
    alone = fk.polar(M)
    M[3, 2, 5] = bad
    R = fk.polar(M)
    assert R[3].isnan().all()
    keep = torch.arange(len(M)) != 3
    assert torch.equal(R[keep], alone[keep])
    R = fk.soften(fk.special_orthogonal(R, M), 0.5)
    assert not R[3].isfinite().all() and R[keep].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 5, 5), (0, 4, 4), (2, 0, 1, 1)])
def test_any_batch_shape(shape):
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert fk.polar(M).shape == shape and fk.special_orthogonal(fk.polar(M), M).shape == shape


def test_wrong_input_says_what_is_expected():
    with pytest.raises(ValueError, match=r"M must have shape \(..., r, r\), got \(3, 4\)"):
        fk.polar(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="int64"):
        fk.polar(torch.zeros(3, 3, dtype=torch.int64))


@pytest.mark.parametrize("r", RANKS)
def test_special_orthogonal_is_a_rotation_close_to_the_best(r):
    M = torch.cat(
        [
            with_singular_values(singular_values(r), seed=r + 100),
            torch.randn(200, r, r, generator=torch.Generator().manual_seed(r), dtype=torch.float64),
        ]
    ).float()
    R = fk.special_orthogonal(fk.polar(M), M)
    assert orthogonality(R) <= 1e-6
    assert (torch.linalg.det(R.double()) > 0).all()
    S = torch.linalg.svdvals(M.double())
    best = S.sum(-1) - torch.where(torch.linalg.det(fk.polar(M).double()) < 0, 2 * S[..., -1], 0)
    objective = (R.double() * M.double()).sum((-1, -2))
    assert ((best - objective) / S.sum(-1).clamp_min(1e-300) <= 1e-3).all()


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("r", [1, 2, 4, 7, 32, 128])
def test_soften_goes_from_the_identity_to_the_rotation(r, strength, reflections):
    R = orthogonal(50, r, torch.Generator().manual_seed(r)).float()
    if not reflections:
        R = fk.special_orthogonal(R, R)
    soft = fk.soften(R, strength)
    assert orthogonality(soft) <= 1e-6
    if not reflections:
        assert (torch.linalg.det(soft.double()) > 0).all()
    blend = (1 - strength) * torch.eye(r, dtype=torch.float64) + strength * R.double()
    assert procrustes_gap(blend, soft) <= 1e-4  # the shift 1e-5, where a blend is all but singular
    if strength in (0.0, 1.0):
        assert torch.equal(soft, R if strength else torch.eye(r).expand_as(R))


@pytest.mark.parametrize("half_turns", [1, 2, 4])
def test_soften_where_the_blend_is_singular(half_turns):
    """λ = 0.5 with an eigenvalue −1: that plane does not rotate, and det stays what it is for R in SO(r)."""
    Q = orthogonal(20, 4, torch.Generator().manual_seed(0))
    turn = torch.ones(4, dtype=torch.float64)
    turn[:half_turns] = -1
    R = (Q * turn) @ Q.mT
    for dtype, bound in BOUND.items():
        soft = fk.soften(R.to(dtype), 0.5)
        assert orthogonality(soft) <= bound + torch.finfo(dtype).eps
        torch.testing.assert_close(soft, torch.eye(4, dtype=dtype).expand_as(soft), atol=0.1, rtol=0)
        blend = 0.5 * (torch.eye(4, dtype=dtype) + R.to(dtype))
        assert orthogonality(fk.polar(blend)) <= bound
