"""R itself against float64: not only its objective, which says little of directions in which M is small.

R is determined by M up to M's own rounding: a change of M by E changes R by at most 2 ‖E‖_F over the sum of the two smallest
singular values of M, the smallest of which counts negative where a reflection had to become a rotation. So R is determined
to ``TOLERANCE`` wherever eps ‖M‖_F over that sum is below it. PyTorch does better, because it computes ill-conditioned M in
float64: all rotations are the exact ones of the factors as they are given.
"""

import functools

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels import reference

from .spectra import RANKS, orthogonal

EPS = torch.finfo(torch.float32).eps
TOLERANCE = 1e-4
SCALES = (1.0, 1e-1, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6)
GAPS = (1.0, 1e-1, 1e-2, 1e-3)


def spectra(r):
    """(n, r) singular values: one, two, half or all but one of them small, with gaps of all sizes to the next one."""
    rows = []
    for scale in SCALES:
        for gap in GAPS:
            for small in {1, 2, (r + 1) // 2, r - 1}:
                S = torch.linspace(1, 0.5, r, dtype=torch.float64)
                if 0 < small <= r:
                    S[r - small :] = scale * (1 + gap * torch.arange(small - 1, -1, -1, dtype=torch.float64))
                rows.append(S / S.max())
    return torch.stack(rows)


def frames(S, seed, d=200):
    """F and F_ref (n, r, d) in float32 whose product has about these singular values, in bases of their own."""
    generator = torch.Generator().manual_seed(seed)
    n, r = S.shape
    U, V = orthogonal(n, r, generator), orthogonal(n, r, generator)
    W = torch.linalg.qr(torch.randn(n, max(d, r), r, dtype=torch.float64, generator=generator)).Q.mT
    root = S.sqrt()[:, None]
    return ((U * root) @ W).float(), ((V * root) @ W).float()


def exact(M, reflections):
    """Rotations of a batch by the definition, in float64."""
    return torch.stack([reference.polar(m) if reflections else reference.special_orthogonal(m) for m in M])


@functools.lru_cache(maxsize=1)  # the same for every strength, and most of the work
def determined_rotations(r, reflections):
    """Frames, their rotations, and which of these their rounding determines."""
    F, F_ref = frames(spectra(r), seed=r)
    M = F.double() @ F_ref.double().mT
    return F, F_ref, exact(M, reflections), bounds(M, reflections) <= TOLERANCE


def bounds(M, reflections):
    """eps ‖M‖_F over the sum of the two smallest singular values: to what M's rounding determines R, for every M."""
    S = torch.linalg.svdvals(M)
    weakest = S[..., -1] * (1 if reflections else torch.linalg.det(M).sign())
    second = S[..., -2] if M.shape[-1] > 1 else S[..., -1]
    return EPS * torch.linalg.matrix_norm(M) / (weakest + second)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("r", RANKS)
def test_rotations_are_the_exact_ones_wherever_they_are_determined(r, reflections, strength):
    F, F_ref, rotations, determined = determined_rotations(r, reflections)
    R = fk.frame_rotations([(F, F_ref)], strength=strength, reflections=reflections).R
    expected = torch.stack([reference.soften(x, strength) for x in rotations])
    assert determined.float().mean() > 0.3
    assert torch.linalg.matrix_norm(R.double() - expected)[determined].max() <= TOLERANCE


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("r", RANKS)
def test_ill_conditioned_rotations_are_the_exact_ones_too(r, reflections):
    """Down to singular values of 1e-6 of the largest; a flip in a well-conditioned M is determined by M's rounding."""
    F, F_ref = frames(spectra(r), seed=r + 200)
    M = F.double() @ F_ref.double().mT
    R, residual, undetermined = fk.frame_rotations([(F, F_ref)], reflections=reflections)
    expected = exact(M, reflections)
    assert not undetermined.any() and residual.max() <= 1e-6
    error, kappa = torch.linalg.matrix_norm(R.double() - expected), torch.linalg.cond(M)
    assert (error <= 1e-5 + 3 * bounds(M, reflections)).all()  # 3: weak directions may be many
    ill = kappa > 1e3
    unreflected = ill & ((torch.linalg.det(M) > 0) | reflections)
    assert unreflected.sum() > 0.1 * len(M) or r == 1
    assert (error <= 4e-6 * r**0.5)[unreflected].all()


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("on", ["A", "B", "joint"])
def test_whole_models_have_the_exact_rotations(on, dtype):
    """Both factors ill-conditioned, some clients reflected, and averages to match."""
    shapes, n = [(4, 64, 48), (8, 200, 130), (8, 200, 130), (16, 96, 64)], 8
    A, B, A_ref, B_ref = [], [], [], []
    for i, (r, d_in, d_out) in enumerate(shapes):
        S = spectra(r)[4:36:4]
        a, a_ref = (x.to(dtype) for x in frames(S, seed=i, d=d_in))
        b, b_ref = (x.to(dtype).mT for x in frames(S, seed=i + 50, d=d_out))
        for given, x in ((A, a), (B, b), (A_ref, a_ref[0]), (B_ref, b_ref[0])):
            given.append(x)
    given = {"A_ref": A_ref if on != "B" else None, "B_ref": B_ref if on != "A" else None}
    result = fk.align_average(A, B, [1.0] * n, **given)
    separate = fk.align_average([list(x) for x in A], [list(x) for x in B], [1.0] * n, **given)
    for i in range(len(shapes)):
        M_A, M_B = A[i].double() @ A_ref[i].double().mT, B[i].double().mT @ B_ref[i].double()
        M = {"A": M_A, "B": M_B, "joint": M_A / A_ref[i].double().square().sum() + M_B / B_ref[i].double().square().sum()}[
            on
        ]
        determined = bounds(M, False) <= TOLERANCE
        expected = exact(M, False)
        assert determined.sum() >= 3
        for R in (result.R[i], separate.R[i]):
            assert torch.linalg.matrix_norm(R.double() - expected)[determined].max() <= TOLERANCE


def test_products_of_low_rank_are_left_alone_where_they_say_nothing_at_any_width():
    """A head of two classes, and adapters whose factors have collapsed: R is the completion nearest the identity."""
    generator = torch.Generator().manual_seed(0)
    for r, rank, d in [(4, 1, 64), (8, 2, 2), (8, 2, 4096), (16, 3, 14336), (64, 8, 1024), (4, 2, 131072)]:
        G = torch.randn(rank, d, dtype=torch.float64, generator=generator)
        T = torch.randn(2, r, rank, dtype=torch.float64, generator=generator)
        F, F_ref = (T[0] @ G).float(), ((T[0] + 0.02 * T[1]) @ G).float()
        for reflections in (False, True):
            R, _, undetermined = fk.frame_rotations([(F, F_ref)], reflections=reflections)
            U, _, Vh = torch.linalg.svd((T[0] @ G) @ ((T[0] + 0.02 * T[1]) @ G).T)
            P, _, Qh = torch.linalg.svd(U[:, rank:].T @ Vh[rank:].T)
            expected = U[:, :rank] @ Vh[:rank] + U[:, rank:] @ P @ Qh @ Vh[rank:]
            assert undetermined == r - rank, (r, rank, d)
            assert torch.linalg.det(expected) > 0  # near the identity, so that SO(r) has the same completion
            assert torch.linalg.matrix_norm(R.double() - expected) <= TOLERANCE


def test_a_completion_in_so_is_the_rotation_nearest_the_identity():
    """M of rank 2 in 4 dimensions whose own part reflects: among all rotations that agree with M, no other is nearer."""
    M = torch.zeros(4, 4, dtype=torch.float64)
    M[0, 0], M[1, 1] = -2.0, 1.0
    R, _, undetermined = fk.procrustes(M.float())
    assert undetermined == 2
    torch.testing.assert_close(R[:2, :2], torch.diag(torch.tensor([-1.0, 1.0])))
    assert abs(torch.linalg.det(R) - 1) <= 1e-6
    assert abs(R.trace()) <= 1e-6  # −1 + 1 + cos 0 − 1: one of the two free directions turns round, no angle is better
    assert abs(fk.procrustes(M.float(), reflections=True).R.trace() - 2) <= 1e-6


def test_planes_that_turn_by_half_a_turn_do_not_rotate_at_half_strength():
    """A client that is the reference with two signs turned, at any condition number of its factors."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    W = torch.linalg.qr(torch.randn(200, 8, generator=generator, dtype=torch.float64)).Q.T
    signs = torch.tensor([-1.0, -1.0, 1, 1, 1, 1, 1, 1])[:, None]
    for decades in (0, 2, 3, 4):
        F_ref = ((U * torch.logspace(0, -decades, 8, dtype=torch.float64)) @ W).float()
        R = fk.frame_rotations([(signs * F_ref, F_ref)], strength=0.5).R
        assert (R - torch.eye(8)).abs().max() <= 1e-6, decades


@pytest.mark.parametrize("scale", [1e-17, 1e-19, 1e17])
def test_small_and_large_factors(scale):
    F, F_ref = frames(spectra(4)[4:12], seed=0)
    expected = fk.frame_rotations([(F, F_ref)]).R
    small = fk.frame_rotations([(F * scale, F_ref * scale)]).R
    assert (small - expected).abs().max() <= 1e-5
    zero = [torch.zeros(len(F), 3, 4)] * len(F)
    A, B = [F * scale], [zero[0]]
    for backend in ("native", "torch"):
        if backend == "native" and fk.backends()["native"].startswith("not"):
            continue
        found = fk.align_average(A, B, [1.0] * len(F), A_ref=[F_ref[0] * scale], backend=backend)
        one = fk.frame_rotations([(F * scale, F_ref[0] * scale)]).R
        assert (found.R[0] - one).abs().max() <= 1e-5


def test_a_frame_is_as_alone_whatever_its_neighbours_are():
    generator = torch.Generator().manual_seed(0)
    F, F_ref = torch.randn(2, 64, 200, generator=generator), torch.randn(64, 200, generator=generator)
    F[:, 32:] *= 1e-5
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = fk.frame_rotations([(F, F_ref)]).R[0]
        F[1] = F_ref
        assert torch.equal(together, fk.frame_rotations([(F, F_ref)]).R[0])
    finally:
        torch.set_num_threads(threads)


def test_a_mask_of_rows_must_have_the_batch_of_the_frames():
    F = torch.randn(3, 2, 4, 10)
    with pytest.raises(ValueError, match=r"rank_mask must have shape \(3, 2, 4, 1\), one entry per row, got \(2, 4, 1\)"):
        fk.frame_rotations([(F, F[0])], rank_mask=torch.ones(2, 4, 1, dtype=torch.bool))
