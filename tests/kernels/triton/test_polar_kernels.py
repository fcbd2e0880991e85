"""Rotations inside the kernels, over the grid of ranks and spectra of the CPU path (``tests/kernels/test_polar.py``)."""

import pytest
import torch
import triton
import triton.language as tl

from fedrot_kernels import reference
from fedrot_kernels.tolerances import PERTURBATION, PERTURBATION_BITS, PERTURBATION_MULTIPLIER, PRODUCT_FLOOR
from fedrot_kernels.triton_backend.launch import padded_rank
from fedrot_kernels.triton_backend.orthogonal import perturbation
from fedrot_kernels.triton_backend.rotations import rotations
from fedrot_kernels.triton_backend.tables import one_adapter

from ..spectra import CONDITION_NUMBERS, orthogonal, orthogonality, procrustes_gap, singular_values, with_singular_values
from ..spectra import RANKS as ALL_RANKS
from .cases import DEVICE, EPS, GPU

FLOOR = PRODUCT_FLOOR[torch.float32]
RANKS = ALL_RANKS if GPU else (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 33)
SHARING = [r for r in RANKS if r <= 8]


def grid(r, most=12):
    """Spectra of rank r: all on a card; without one condition numbers 1, 1e3, 1e7 and low ranks."""
    S = singular_values(r)
    if GPU:
        return S
    kinds = len(CONDITION_NUMBERS) * 4
    chosen = [4 * CONDITION_NUMBERS.index(kappa) + kind for kappa in (1e7, 1e3, 1.0) for kind in range(4)]
    return S[[*range(kinds, len(S)), *chosen][: most if r <= 32 else 4]]


def procrustes(M, *, strength=1.0, reflections=True, floor=0.0):
    """R and residual of M (n, r, r), on the CPU; M[:, :r, :r] inside leading dimensions as large as r."""
    n, r, _ = M.shape
    R, residual, _ = rotations(
        M.float().to(DEVICE)[None].contiguous(),
        one_adapter(r, torch.device(DEVICE)),
        RP=padded_rank(r),
        leading=r,
        n_clients=n,
        joint=False,
        strength=strength,
        reflections=reflections,
        floor=floor,
    )
    R, residual = R[0].cpu(), residual[0].cpu()
    good = residual.isfinite()
    if good.any():  # the residual is what it says, up to its own rounding
        true = (R[good].double().mT @ R[good].double() - torch.eye(r, dtype=torch.float64)).abs().amax((-1, -2))
        assert ((residual[good] - true).abs() <= (r**0.5 + 1) * EPS).all()
    return R, residual


@pytest.mark.parametrize("floor", [0.0, FLOOR])
@pytest.mark.parametrize("r", RANKS)
def test_polar_is_orthogonal_and_optimal(r, floor):
    M = with_singular_values(grid(r, most=6 if floor else 12), seed=r).float()
    R, residual = procrustes(M, floor=floor)
    assert orthogonality(R) <= 1e-6 and residual.max() <= 1e-6
    # A direction of singular value σ below the floor does not rotate, which costs 2σ of ‖M‖_* ≥ ‖M‖_F, and there are r.
    assert procrustes_gap(M, R) <= 2e-6 + 2 * r * floor


@pytest.mark.skipif(not GPU, reason="a thousand matrices take minutes without a card")
@pytest.mark.parametrize("r", [64, 100, 128])
@pytest.mark.parametrize("n", [1000])
def test_more_large_matrices_than_programs(n, r):
    M = torch.randn(n, r, r, generator=torch.Generator().manual_seed(0))
    R, _ = procrustes(M, strength=1.0, reflections=False, floor=FLOOR)
    assert orthogonality(R) <= 1e-6 and (torch.linalg.det(R.double()) > 0).all()
    assert torch.equal(R[-3:], procrustes(M[-3:], reflections=False, floor=FLOOR)[0])


def test_more_matrices_than_programs_on_scratch_memory():
    """Programs go on to the next matrix in the same scratch; where there is no card there are two of them."""
    M = with_singular_values(grid(33), seed=2).float()[:3]
    R, _ = procrustes(M)
    assert torch.equal(R[2:], procrustes(M[2:])[0])


def test_the_largest_rank():
    M = with_singular_values(torch.logspace(0, -3, 128, dtype=torch.float64)[None], seed=1).float()
    M[0, 0] *= -torch.linalg.det(M.double()).sign().float()  # reflected
    R, _ = procrustes(M, reflections=False)
    assert orthogonality(R) <= 1e-6 and torch.linalg.det(R[0].double()) > 0


@pytest.mark.parametrize("r", [4, 8, 16, *([64] if GPU else [])])
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_polar_does_not_depend_on_the_scale(scale, r):
    M = with_singular_values(grid(r), seed=0).float() * scale
    R, _ = procrustes(M)
    assert orthogonality(R) <= 1e-6 and procrustes_gap(M, R) <= 2e-6


@pytest.mark.parametrize("r", [2, 5, 8, 12, 16, 32, *([64, 128] if GPU else [])])
def test_polar_agrees_with_the_svd_where_the_factor_is_determined(r):
    M = with_singular_values(singular_values(r)[:8], seed=3)[:: 1 if GPU else 2]  # condition numbers 1 and 3
    expected = torch.stack([reference.polar(m) for m in M])
    lapack = torch.stack([reference.polar(m) for m in M.float()]).double()
    error, theirs = (procrustes(M)[0].double() - expected).abs().max(), (lapack - expected).abs().max()
    assert error <= theirs + r * EPS  # what one product of two such matrices loses


@pytest.mark.parametrize("r", [2, 5, 16, *([64] if GPU else [])])
def test_nilpotent_matrices(r):
    M = torch.stack([torch.diag(torch.ones(r - 1), 1), torch.triu(torch.ones(r, r), 1)])
    R, _ = procrustes(M)
    assert orthogonality(R) <= 1e-6 and procrustes_gap(M[:1], R[:1]) <= 2e-6


@triton.jit
def perturbation_kernel(p_out, R: tl.constexpr):
    i = tl.arange(0, R)
    tl.store(p_out + i[:, None] * R + i[None, :], perturbation(i, i))


def exact_perturbation(r):
    odd = 2 * torch.arange(r) + 1
    numerators = odd[:, None] * odd * PERTURBATION_MULTIPLIER % (1 << PERTURBATION_BITS)
    return PERTURBATION * (numerators.double() / (1 << PERTURBATION_BITS) - 0.5)


@pytest.mark.parametrize("r", [4, 16, 128])
def test_the_perturbation_of_singular_matrices_is_the_one_of_its_definition(r):
    out = torch.empty(r, r, device=DEVICE)
    perturbation_kernel[(1,)](out, r)
    exact = exact_perturbation(r)
    assert ((out.cpu() - exact).abs() <= EPS * exact.abs()).all()  # its factor and its product are rounded


def test_the_perturbation_of_singular_matrices_is_regular_at_every_rank():
    smallest = [torch.linalg.svdvals(exact_perturbation(r))[-1] for r in range(1, 129)]
    assert min(smallest) >= 1.3e-3 * PERTURBATION


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("floor", [0.0, FLOOR])
@pytest.mark.parametrize("r", [1, 4, 5, 16, 33])
def test_directions_without_information_do_not_rotate(r, floor, reflections):
    M = torch.zeros(2, r, r)
    M[1] = 2 * torch.eye(r)
    if r > 3:
        M[1, 2:] = 0
        M[1, :2, :2] = torch.tensor([[0.0, 3.0], [-3.0, 0.0]])
    expected = torch.eye(r).repeat(2, 1, 1)
    if r > 3:
        expected[1, :2, :2] = M[1, :2, :2] / 3
    R, _ = procrustes(M, floor=floor, reflections=reflections)
    assert torch.equal(R[0], expected[0])  # to the last bit
    torch.testing.assert_close(R[1], expected[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 5, 8, 12, 16, 32, 33, *([64, 128] if GPU else [])])
def test_special_orthogonal_is_a_rotation_close_to_the_best(r):
    few = 2 if r > 16 else 5
    M = torch.cat(
        [
            with_singular_values(grid(r), seed=r + 100)[:few],
            torch.randn(200 if GPU else few, r, r, generator=torch.Generator().manual_seed(r), dtype=torch.float64),
        ]
    ).float()
    R, _ = procrustes(M, reflections=False)
    assert orthogonality(R) <= 1e-6
    assert (torch.linalg.det(R.double()) > 0).all()
    reflected = torch.linalg.det(procrustes(M)[0].double()) < 0
    assert reflected.any() and not reflected.all()
    S = torch.linalg.svdvals(M.double())
    best = S.sum(-1) - torch.where(reflected, 2 * S[..., -1], 0)
    objective = (R.double() * M.double()).sum((-1, -2))
    assert ((best - objective) / S.sum(-1).clamp_min(1e-300) <= 1e-3).all()


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("r", [2, 4, 8, 16, 32, *([64, 128] if GPU else [33])])
def test_rotations_are_the_exact_ones_up_to_the_bound_of_the_floor(r, reflections):
    """With two close weak directions, of which a flip must find the weaker; see ``tests/kernels/test_exactness.py``."""
    rows = []
    for scale, gap in [(1.0, 0.1), (3e-2, 1.0), (3e-2, 0.1), (3e-3, 1.0), (1e-3, 1.0), (3e-4, 1.0)][
        : None if r <= 16 else 3
    ]:
        S = torch.linspace(2, 1, r, dtype=torch.float64)
        S[-2:] = scale * torch.tensor([1 + gap, 1.0])
        rows += [S, S]
    M = with_singular_values(torch.stack(rows), seed=r + 7)
    M[::2, 0] *= torch.linalg.det(M[::2]).sign()[:, None]
    M[1::2, 0] *= -torch.linalg.det(M[1::2]).sign()[:, None]
    M = M.float()
    R, _ = procrustes(M, reflections=reflections, floor=FLOOR)
    for m, found in zip(M.double(), R.double(), strict=True):
        S = torch.linalg.svdvals(m)
        weakest = S[-1] * (1 if reflections else torch.linalg.det(m).sign())
        exact = reference.polar(m) if reflections else reference.special_orthogonal(m)
        assert torch.linalg.matrix_norm(found - exact) <= 4 * EPS * S.norm() / (S[-2] + weakest), S


@pytest.mark.parametrize("r", [1, 4, 5, 16, 33])
def test_directions_below_the_floor_are_counted(r):
    S = torch.linspace(2, 1, r, dtype=torch.float64).repeat(4, 1)
    for i, left in enumerate((0, 1, r // 2, r)):
        S[i, r - left :] = 0
    M = with_singular_values(S, seed=3).float()
    M[0] *= 1e-9
    M[3] = 0
    found = rotations(
        M.to(DEVICE)[None].contiguous(),
        one_adapter(r, torch.device(DEVICE)),
        RP=padded_rank(r),
        leading=r,
        n_clients=4,
        joint=False,
        strength=0.5,
        reflections=False,
        floor=FLOOR,
    )
    assert found.undetermined.tolist() == [[0, 1 if r > 1 else r, r // 2, r]]


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5, *([0.9] if GPU else [])])
@pytest.mark.parametrize("r", [1, 2, 4, 7, 32, *([64, 128] if GPU else [33])])
def test_soften_goes_from_the_identity_to_the_rotation(r, strength, reflections):
    M = orthogonal(50 if GPU else 8 if r < 8 else 1, r, torch.Generator().manual_seed(r)).float()
    R, _ = procrustes(M, reflections=reflections)
    soft, residual = procrustes(M, strength=strength, reflections=reflections)
    assert orthogonality(soft) <= 1e-6 and residual.max() <= 1e-6
    if not reflections:
        assert (torch.linalg.det(soft.double()) > 0).all()
    blend = (1 - strength) * torch.eye(r, dtype=torch.float64) + strength * R.double()
    assert procrustes_gap(blend, soft) <= 1e-4  # the shift 1e-5, where a blend is all but singular
    if strength == 0:
        torch.testing.assert_close(soft, torch.eye(r).expand_as(soft), atol=1e-6, rtol=0)


@pytest.mark.parametrize("half_turns", [1, 2, 4])
def test_soften_where_the_blend_is_singular(half_turns):
    """λ = 0.5 with an eigenvalue −1: that plane does not rotate, and det stays what it is for R in SO(r)."""
    Q = orthogonal(8, 4, torch.Generator().manual_seed(0))
    turn = torch.ones(4, dtype=torch.float64)
    turn[:half_turns] = -1
    soft, _ = procrustes((Q * turn) @ Q.mT, strength=0.5)
    assert orthogonality(soft) <= 1e-6
    torch.testing.assert_close(soft, torch.eye(4).expand_as(soft), atol=0.1, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("r", [1, 4, 8, 12, 33])
def test_one_bad_matrix_leaves_the_others_untouched(r, bad):
    M = with_singular_values(grid(r, most=5), seed=1).float()[: 5 if r < 12 else 2]
    settings = {"strength": 0.5, "reflections": False, "floor": FLOOR} if r < 32 else {}
    alone, residual_alone = procrustes(M, **settings)
    M[1, r // 2, r - 1] = bad
    R, residual = procrustes(M, **settings)
    keep = torch.arange(len(M)) != 1
    assert R[1].isnan().all() and residual[1].isnan()
    assert torch.equal(R[keep], alone[keep]) and torch.equal(residual[keep], residual_alone[keep])


@pytest.mark.parametrize("r", SHARING)
def test_matrices_that_share_a_program_are_as_alone(r):
    """To the bit."""
    M = with_singular_values(grid(r, most=5), seed=5).float()
    settings = {"strength": 0.9, "reflections": False, "floor": FLOOR}
    together, residual = procrustes(M, **settings)
    alone, far = map(torch.cat, zip(*(procrustes(m[None], **settings) for m in M), strict=True))
    assert torch.equal(alone, together) and torch.equal(far, residual)


def test_ranks_of_one_launch_may_differ():
    """Slices are summed in order; beyond a matrix's rank nothing is read, and nothing is written."""
    RP, n, ranks = 8, 3, (8, 3, 1, 5)
    M, adapters, sums = torch.full((9, n, RP, RP), torch.nan), [], []
    for i, (rank, (first, last)) in enumerate(zip(ranks, [(0, 1), (1, 4), (4, 6), (6, 9)], strict=True)):
        M[first:last, :, :rank, :rank] = torch.randn(last - first, n, rank, rank, generator=torch.Generator().manual_seed(i))
        adapters.append((rank, first, last, 0, 0))
        sums.append(M[first:last, :, :rank, :rank].cumsum(0)[-1])
    R, residual, _ = rotations(
        M.to(DEVICE),
        torch.tensor(adapters, dtype=torch.int32, device=DEVICE),
        RP=RP,
        leading=RP,
        n_clients=n,
        joint=False,
        strength=1.0,
        reflections=False,
        floor=0.0,
    )
    assert residual.shape == (4, n) and residual.max() <= 1e-6
    for i, rank in enumerate(ranks):
        of_rank = R[i, :, :rank, :rank].cpu()
        assert (of_rank - procrustes(sums[i], reflections=False)[0]).abs().max() <= 1e-6
        assert R[i, :, rank:].isnan().all() and R[i, :, :, rank:].isnan().all()
