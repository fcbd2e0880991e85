"""A stream by the compiled library: every rank on every instruction set, what it refuses, and what it leaves as it was."""

from array import array

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels.native_backend import library
from fedrot_kernels.native_backend.tensors import read_tensors
from fedrot_kernels.sketch import SKETCH_SIZE as K
from fedrot_kernels.sketch import estimate_errors, projection

from .test_native import EPS, SETS, inside
from .test_whole_model import model

pytestmark = pytest.mark.skipif(library.instruction_set() is None, reason="the compiled library is not there")
WEIGHTS = [2.0, 0.0, 0.5, 3.0]
SEED = 5


class Streamed:
    """A stream of the adapters A and B, per adapter (N, r, d_in) and (N, d_out, r), and of other tensors (N, …)."""

    def __init__(self, A, B, others=(), A_ref=None, B_ref=None, strength=0.6, reflections=False, instructions=None):
        self.A, self.B, self.others = A, B, others
        shapes = [(*a.shape[1:], b.shape[1]) for a, b in zip(A, B, strict=True)]
        # Between the factors lies a tensor that is not averaged, as integers do.
        places = [i for j in range(len(A)) for i in (3 * j, 3 * j + 2)] + [3 * len(A) + i for i in range(len(others))]
        clients = fk.ClientTensors(shapes, [a.dtype for a in A], [(x[0].numel(), x.dtype) for x in others], places)
        given = [x[0] for pair in zip(A, B, strict=True) for x in pair] + [x[0] for x in others]
        self.sums = [torch.zeros(x.shape, dtype=fk.working_dtype(x)) for x in given]
        self.out = [
            total if x.dtype == total.dtype else torch.empty_like(x) for total, x in zip(self.sums, given, strict=True)
        ]
        self.undetermined, self.directions = (array("q", bytes(8 * len(A))) for _ in range(2))
        self.stream = fk.Stream(clients, self.sums, self.undetermined, self.directions, instructions)
        self.sides = 1 if A_ref is B_ref is None else 2
        self.sketches = [torch.zeros(self.sides, 2 * K * r + K * K, dtype=torch.float64) for r, _, _ in shapes]
        self.stream.sketch([x[None] for x in self.sketches], SEED)
        if self.sides == 2:
            self.stream.rotate_towards(A_ref, B_ref, strength=strength, reflections=reflections)
        self.total, self.angles = 0.0, []

    def tensors(self, i, place=lambda x: x):
        between = torch.arange(3)
        factors = [x for a, b in zip(self.A, self.B, strict=True) for x in (place(a[i]), between, place(b[i]))]
        return factors + [place(x[i]) for x in self.others]

    def look(self, tensors, i=0):
        return self.stream.look(read_tensors(tensors), lambda j: (self.A[j][i], self.B[j][i]))

    def add(self, i, weight, place=lambda x: x):
        tensors = self.tensors(i, place)
        assert self.look(tensors, i) and self.stream.is_finite
        self.total += weight
        self.stream.add(weight, weight / self.total)
        self.angles.append(list(self.stream.angles))

    def state(self):
        return [x.clone() for x in (*self.sums, *self.sketches)] + [list(self.undetermined), list(self.directions)]


def added(weights=WEIGHTS, place=lambda x, i: x, **options):
    streamed = Streamed(**options)
    for i, weight in enumerate(weights):
        streamed.add(i, weight, lambda x, i=i: place(x, i))
    return streamed


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 33, 48, 65])
@pytest.mark.parametrize("on", ["A", "B", "AB", ""])
def test_every_rank_and_width_on_every_instruction_set(on, r, dtype, instructions):
    """Odd widths and unaligned memory between NaNs: PyTorch's rotations, and the exact means and sketches."""
    shapes = [(r, 1, 7), (r, 37, 270), (r, 530, 1)] if r <= 16 else [(r, 2 * r + 3, 3 * r + 1)]
    A, B, A_ref, B_ref = model(shapes, len(WEIGHTS), dtype, seed=r)
    refs = {"A_ref": A_ref if "A" in on else None, "B_ref": B_ref if "B" in on else None}
    if r % 2:  # half-precision references are read where they lie
        refs = {name: x and [y.to(dtype) for y in x] for name, x in refs.items()}
    placed = {name: x if x is None else [inside(y, 1) for y in x] for name, x in refs.items()}
    streamed = added(place=lambda x, i: inside(x, i + 1), A=A, B=B, instructions=instructions, **placed)
    eye = torch.eye(r).expand(len(WEIGHTS), r, r)
    R = [eye] * len(A)
    if on:
        options = {"strength": 0.6, "backend": "torch"}
        found = [
            [
                fk.find_rotations([A[j][i]], [B[j][i]], **{n: x and [x[j]] for n, x in refs.items()}, **options)
                for i in range(len(WEIGHTS))
            ]
            for j in range(len(A))
        ]
        R = [torch.cat([x.R for x in per_client]) for per_client in found]
        assert list(streamed.undetermined) == [sum(int(x.undetermined) for x in per_client) for per_client in found]
        assert list(streamed.directions) == [r * len(WEIGHTS)] * len(A)
        angles = torch.tensor(streamed.angles, dtype=torch.float64)
        assert (angles - torch.stack([fk.rotation_angle(x) for x in R], dim=1)).abs().max() <= 1e-3
    w = torch.tensor(WEIGHTS, dtype=torch.float64)
    shares = w / w.sum()
    for j, (a, b) in enumerate(zip(A, B, strict=True)):
        turned = R[j].double().mT @ a.double(), b.double() @ R[j].double()
        # Of rotations that agree to 3e-6, which are rounded once a client.
        for total, x in zip(streamed.sums[2 * j : 2 * j + 2], turned, strict=True):
            assert (total - (w[:, None, None] * x).sum(0)).abs().max() <= 3e-6 * r**0.5 * w.sum() * x.abs().max()
        psi, omega = projection(SEED, "B", b.shape[1]).matrix, projection(SEED, "A", a.shape[2]).matrix
        for side, (F_A, F_B) in enumerate([turned, (a.double(), b.double())][: streamed.sides]):
            left, right = F_B.mT @ psi, F_A @ omega
            mean_left, mean_right = ((shares[:, None, None] * x).sum(0) for x in (left, right))
            lost = torch.einsum("n,nra,nrb->ab", shares, left - mean_left, right - mean_right)
            expected = mean_left, mean_right, lost
            found = streamed.sketches[j][side].split((K * r, K * r, K * K))
            scale = left.norm() * right.norm()
            for x, y, size in zip(found, expected, (left.norm(), right.norm(), scale), strict=True):
                assert (x - y.flatten()).abs().max() <= 1e-5 * size
    mean_A, mean_B = (
        [(shares[:, None, None] * F).sum(0) for F in of]
        for of in zip(
            *((R[j].double().mT @ A[j].double(), B[j].double() @ R[j].double()) for j in range(len(A))), strict=True
        )
    )
    estimates = streamed.stream.close(streamed.total, streamed.out)
    assert streamed.stream.is_finite
    own = torch.finfo(dtype).eps if dtype != torch.float32 else 0
    for j in range(len(A)):
        for x, y in ((streamed.out[2 * j], mean_A[j]), (streamed.out[2 * j + 1], mean_B[j])):
            assert x.dtype == dtype
            assert ((x - y).abs() <= own * y.abs() + 3e-6 * r**0.5 * max(y.abs().max(), 1) + 1e-7).all()
    wide = [x.double() for x in A], [x.double() for x in B], [x.double() for x in R] if on else None
    exact = estimate_errors(*wide, WEIGHTS, mean_A, mean_B, SEED)
    size = exact.numbers[:, 6].max() + exact.numbers[:, 0].max()
    assert (estimates.numbers - exact.numbers).abs().max() <= 1e-4 * size
    assert (estimates.squares - exact.squares).abs().max() <= 1e-4 * exact.squares.max()


def test_other_tensors_of_every_dtype_are_averaged():
    A, B, *_ = model([(2, 5, 3)], 4)
    others = [
        torch.randn(4, *shape).to(dtype)
        for shape in ((7,), (3, 11), ())
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ]
    streamed = added(A=A, B=B, others=others)
    streamed.stream.close(streamed.total, streamed.out)
    assert streamed.stream.is_finite
    for x, mean in zip(others, streamed.out[2:], strict=True):
        w = torch.tensor(WEIGHTS, dtype=torch.float64).view(-1, *[1] * (x.dim() - 1)) / sum(WEIGHTS)
        exact = (w * x.double()).sum(0)
        assert mean.dtype == x.dtype and mean.shape == exact.shape
        bound = torch.finfo(x.dtype).eps + (4 * EPS if x.dtype != torch.float64 else 4 * torch.finfo(x.dtype).eps)
        assert ((mean.double() - exact).abs() <= bound * (w * x.double().abs()).sum(0)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sketched", [False, True])
def test_a_client_that_is_not_finite_leaves_the_sums_as_they_were(bad, sketched):
    A, B, A_ref, _ = model([(4, 70, 33), (16, 130, 20)], 3)
    others = [torch.randn(3, 41), torch.randn(3, 5).double(), torch.randn(3, 9).bfloat16()]
    streamed = Streamed(A, B, others, A_ref=A_ref)
    if not sketched:
        streamed.stream._stream.sketches = streamed.stream._stream.problem.shifts = None
    streamed.add(0, 1.0)
    before = streamed.state()
    good = streamed.tensors(1)
    for k, x in enumerate(good):
        if not x.is_floating_point():
            continue
        for at in (0, x.numel() // 2, x.numel() - 1):
            spoilt = list(good)
            spoilt[k] = x.clone()
            spoilt[k].view(-1)[at] = bad
            assert streamed.look(spoilt, 1) and not streamed.stream.is_finite
    assert all((x == y) if isinstance(x, list) else torch.equal(x, y) for x, y in zip(streamed.state(), before, strict=True))
    assert streamed.look(good, 1) and streamed.stream.is_finite


def test_finite_clients_whose_sums_overflow_are_finite():
    A, B, _, _ = model([(4, 70, 33)], 1)
    streamed = Streamed([torch.full_like(A[0], 3e38)], B)
    assert streamed.look(streamed.tensors(0)) and streamed.stream.is_finite
    streamed.stream.add(1e-3, 1.0)
    streamed.stream.close(1e-4, streamed.out)
    assert not streamed.stream.is_finite


def test_clients_that_are_not_what_the_stream_is_of_are_not_read():
    A, B, A_ref, _ = model([(4, 70, 33)], 1)
    streamed = Streamed(A, B, [torch.randn(1, 6)], A_ref=A_ref)
    good = streamed.tensors(0)
    a, between, b, other = good
    for spoilt in (
        [a.bfloat16(), between, b, other],
        [a, between, b.double(), other],
        [a[:, :69], between, b, other],  # strided
        [a[:, :69].contiguous(), between, b, other],
        [a.t(), between, b, other],
        [a, between, b, other[:5]],
        [a, between, b, other.half()],
        [between, a, b, other],
        [a, between, b],
    ):
        assert not streamed.look(spoilt)
    assert streamed.look([x.clone() for x in good])


@pytest.mark.parametrize("instructions", SETS)
def test_the_number_of_threads_changes_no_bit(instructions, monkeypatch):
    A, B, A_ref, _ = model([(4, 33, 20)] * 5 + [(16, 300, 70), (3, 8, 9)] * 4, 4)
    results = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        streamed = added(
            A=A,
            B=B,
            others=[torch.randn(4, 9, generator=torch.Generator().manual_seed(0))],
            A_ref=A_ref,
            instructions=instructions,
        )
        estimates = streamed.stream.close(streamed.total, streamed.out)
        results.append([*streamed.out, *streamed.sketches, *estimates, torch.tensor(streamed.angles)])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("reflections", [False, True])
def test_rotations_that_float32_does_not_find_are_found_as_by_pytorch(reflections):
    A, B, A_ref, _ = model([(4, 33, 20)] * 3, 2)
    A[1][0, 3] = 1e-4 * A[1][0, 2]
    A[2][0] = 0
    streamed = Streamed(A, B, A_ref=A_ref, strength=1.0, reflections=reflections)
    streamed.add(0, 1.0)
    options = {"A_ref": A_ref, "B_ref": None, "strength": 1.0, "reflections": reflections, "backend": "torch"}
    found = fk.find_rotations([a[0] for a in A], [b[0] for b in B], **options)
    assert list(streamed.undetermined) == found.undetermined.tolist() and streamed.undetermined[2] == 4
    for j in range(3):
        expected = found.R[j].mT @ A[j][0]
        assert (streamed.sums[2 * j] - expected).abs().max() <= 3e-6 * A[j][0].abs().max()
    assert streamed.stream.residual.max() <= 1e-6


def test_references_that_do_not_lie_in_a_row_or_whose_sign_is_a_flag():
    A, B, A_ref, _ = model([(4, 33, 20)], 1)
    expected = added([1.0], A=A, B=B, A_ref=A_ref)
    for odd in (A_ref[0].t().contiguous().t(), torch._neg_view(-A_ref[0]), torch.nn.Parameter(A_ref[0])):
        found = added([1.0], A=A, B=B, A_ref=[odd])
        assert all(torch.equal(x, y) for x, y in zip(found.sums, expected.sums, strict=True))


def test_products_that_overflow_have_no_rotation():
    A, B, A_ref, _ = model([(4, 33, 20)], 1)
    streamed = Streamed([A[0] * 1e38], B, A_ref=[A_ref[0] * 1e38])
    assert streamed.look(streamed.tensors(0)) and streamed.stream.is_finite
    assert streamed.stream.residual.isnan().all()
