"""The compiled library alone: every instruction set, every rank, any place in memory, threads, and what goes wrong."""

import statistics
import subprocess
import sys
import time

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels import reference
from fedrot_kernels.native_backend import library
from fedrot_kernels.torch_backend import whole_model as torch_backend

from .spectra import orthogonal
from .test_whole_model import model

HERE = library.instruction_set()
pytestmark = pytest.mark.skipif(HERE is None, reason="the compiled library is not built, or switched off")
SETS = library.INSTRUCTION_SETS[: library.INSTRUCTION_SETS.index(HERE or "baseline") + 1]
EPS = torch.finfo(torch.float32).eps


def native(*args, **kwargs):
    from fedrot_kernels.native_backend.whole_model import align_average

    with torch.no_grad():
        return align_average(*args, **{"A_ref": None, "B_ref": None, "strength": 1.0, "reflections": False} | kwargs)


def inside(x, offset):
    """The same values, ``offset`` entries into memory whose other entries are NaN."""
    memory = torch.full((x.numel() + 2 * offset + 64,), torch.nan, dtype=x.dtype)
    view = memory[offset : offset + x.numel()].view(x.shape)
    return view.copy_(x)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", [*range(1, 10), 12, 15, 16, 17, 24, 31, 33, 48, 64, 65, 128])
def test_every_rank_and_width_on_every_instruction_set(r, dtype, instructions):
    """Odd widths, unaligned memory between NaNs: means to rounding of the exact ones by R, R as close as PyTorch's."""
    shapes = [(r, 1, 7), (r, 37, 130), (r, 520, 1)] if r <= 16 else [(r, 2 * r + 3, 3 * r + 1)]
    weights = [1.0, 0.0, 2.5]
    A, B, A_ref, B_ref = model(shapes, 3, dtype, seed=r)
    placed = [[[inside(x, i + 1) for i, x in enumerate(clients)] for clients in of_factor] for of_factor in (A, B)]
    refs = {"A_ref": [inside(x, 1) for x in A_ref], "B_ref": [inside(x, 3) for x in B_ref]}
    found = native(*placed, weights, **refs, strength=0.6, instructions=instructions)
    plain = torch_backend.align_average(A, B, weights, A_ref=A_ref, B_ref=B_ref, strength=0.6, reflections=False)
    assert bool(found.finite) and found.residual.max() <= 1e-6
    assert torch.equal(found.undetermined, plain.undetermined)
    angles = torch.stack([fk.rotation_angle(x) for x in found.R])
    assert (found.angles - angles).abs().max() <= 1e-3
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        assert (found.R[i] - plain.R[i]).abs().max() <= 3e-6
        R = list(found.R[i].double())
        exact_A = reference.rotate_average(list(a.double()), R, weights)
        exact_B = reference.rotate_average(list(b.double().mT), R, weights).mT
        for mean, exact, F in ((found.A[i], exact_A, a), (found.B[i], exact_B, b)):
            assert mean.dtype == dtype and mean.shape == exact.shape
            own = torch.finfo(dtype).eps if dtype != torch.float32 else 0
            assert ((mean - exact).abs() <= own * exact.abs() + 2 * r * EPS * F.double().abs().max() + 1e-7).all()


@pytest.mark.parametrize("on", ["A", "B", "AB"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_references_are_read_where_they_lie(dtype, on, monkeypatch):
    """They give the bits of the same numbers as float32, and no float32 copy of the model is made."""
    A, B, A_ref, B_ref = model([(4, 33, 20), (16, 400, 30), (5, 7, 9)], 3, seed=1)
    refs = {
        f"{name}_ref": [x.to(dtype) for x in of_factor] for name, of_factor in (("A", A_ref), ("B", B_ref)) if name in on
    }
    wide = native(A, B, [1.0, 2.0, 0.5], **{name: [x.float() for x in of_factor] for name, of_factor in refs.items()})
    convert = torch.Tensor.to

    def to(x, *args, **kwargs):
        assert x.dtype != dtype, "a reference is converted"
        return convert(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    found = native(A, B, [1.0, 2.0, 0.5], **refs)
    for of_one, of_other in ((found.A, wide.A), (found.B, wide.B), (found.R, wide.R)):
        assert all(torch.equal(x, y) for x, y in zip(of_one, of_other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("instructions", SETS)
def test_every_half_precision_number_is_read_and_written_as_torch_does(instructions, dtype):
    """All 65,536 of them, by one client whose rotation is I, and again where the average lies between two of them."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()].clone()
    one = [finite[None, None]], [torch.ones(1, 1, 1, dtype=dtype)]
    A_ref = [torch.zeros(1, len(finite))]
    assert torch.equal(native(*one, [1.0], A_ref=A_ref, instructions=instructions).A[0], finite[None])
    two = torch.stack([finite, finite.roll(1)])[:, None]
    found = native([two], [torch.ones(2, 1, 1, dtype=dtype)], [1.0, 1.0], A_ref=A_ref, instructions=instructions)
    expected = (two.float() * 0.5).sum(0).to(dtype)
    assert torch.equal(found.A[0], expected) and bool(found.finite) == bool(expected.isfinite().all())


@pytest.mark.parametrize("instructions", SETS)
def test_the_number_of_threads_changes_no_bit(instructions, monkeypatch):
    A, B, A_ref, _ = model([(4, 33, 20)] * 5 + [(16, 300, 70), (3, 8, 9)] * 4, 4)
    results = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(native(A, B, [1, 2, 3, 4], A_ref=A_ref, strength=0.5, instructions=instructions))
    for other in results[1:]:
        for x, y in zip(results[0].A + results[0].B + results[0].R, other.A + other.B + other.R, strict=True):
            assert torch.equal(x, y)


def test_many_clients():
    A, B, A_ref, _ = model([(2, 5, 3)], 1000)
    w = torch.rand(1000, generator=torch.Generator().manual_seed(0)).tolist()
    found = native(A, B, w, A_ref=A_ref)
    plain = torch_backend.align_average(A, B, w, A_ref=A_ref, B_ref=None, strength=1.0, reflections=False)
    for x, y in zip(found.A + found.B, plain.A + plain.B, strict=True):
        assert (x - y).abs().max() <= 3e-6


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("r", [4, 5, 8, 16, 24])
def test_every_client_rounds_the_sum_once(r, instructions):
    """400 clients lose what one rounding each of a growing sum does; r roundings each lose about √r times as much."""
    n = 400
    A, B, A_ref, _ = model([(r, 53, 31)], n, seed=r)
    found = native(A, B, [1.0] * n, A_ref=A_ref, instructions=instructions)
    R = list(found.R[0].double())
    exact_A = reference.rotate_average(list(A[0].double()), R, [1.0] * n)
    exact_B = reference.rotate_average(list(B[0].double().mT), R, [1.0] * n).mT
    for mean, exact in ((found.A[0], exact_A), (found.B[0], exact_B)):
        # A rounding's deviation is 0.2 eps of the sum, over a binade; of a sum that grows evenly √(N/3) of them add up.
        assert (mean - exact).norm() <= 1.4 * 0.2 * EPS * (n / 3) ** 0.5 * exact.norm()


@pytest.mark.parametrize("threads", [1, 2])
def test_careful_rotations_in_inference_mode(threads, monkeypatch):
    """PyTorch has the mode per thread, and the library calls back from threads of its own."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    A, B, A_ref, _ = model([(4, 33, 20)] * 8, 2)
    for of_adapter in A:
        of_adapter[0, 3] = 1e-4 * of_adapter[0, 2]
    expected = native(A, B, [1, 1], A_ref=A_ref)
    with torch.inference_mode():
        found = native(A, B, [1, 1], A_ref=A_ref)
    assert all(torch.equal(x, y) for x, y in zip(found.A + found.R, expected.A + expected.R, strict=True))


def test_factors_whose_memory_was_freed_are_refused():
    A, B, A_ref, _ = model([(4, 33, 20)], 2)
    freed = torch.zeros(4, 33)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a factor \(4, 33\) has no memory: it was freed, as FSDP does"):
        fk.align_average([[A[0][0], freed]], B, [1, 1], A_ref=A_ref)
    with pytest.raises(ValueError, match=r"a factor \(4, 33\) has no memory: it was freed, as FSDP does"):
        fk.align_average(A, B, [1, 1], A_ref=[freed])


def test_clients_that_share_memory_or_want_gradients():
    A, B, A_ref, B_ref = model([(4, 33, 20)], 3)
    expected = native(A, B, [1, 1, 1], B_ref=B_ref)
    wanting = [[torch.nn.Parameter(x) for x in A[0]]], [[torch.nn.Parameter(x) for x in B[0]]]
    found = native(*wanting, [1, 1, 1], B_ref=[torch.nn.Parameter(B_ref[0])])
    assert torch.equal(found.A[0], expected.A[0]) and not found.A[0].requires_grad
    same = native([[A[0][0]] * 3], [[B[0][0]] * 3], [1, 2, 3], A_ref=A_ref)
    alone = native([[A[0][0]]], [[B[0][0]]], [1], A_ref=A_ref)
    assert (same.A[0] - alone.A[0]).abs().max() <= 1e-6


def test_an_error_in_a_careful_rotation_is_raised(monkeypatch):
    from fedrot_kernels.native_backend import whole_model

    A, B, A_ref, _ = model([(4, 33, 20)] * 3, 2)
    A[1][0, 3] = 1e-4 * A[1][0, 2]
    native(A, B, [1, 1], A_ref=A_ref)

    def broken(*args, **kwargs):
        raise RuntimeError("no rotation today")

    monkeypatch.setattr(whole_model, "rotations", broken)
    with pytest.raises(RuntimeError, match="no rotation today"):
        native(A, B, [1, 1], A_ref=A_ref)


def test_what_the_library_does_not_take_is_said(monkeypatch):
    A, B, A_ref, _ = model([(4, 33, 20)], 2, torch.float64)
    with pytest.raises(ValueError, match="float16, bfloat16 and float32 tensors on a CPU, of rank up to 128; use torch"):
        fk.align_average(A, B, [1, 1], A_ref=A_ref, backend="native")
    from fedrot_kernels import dispatch

    monkeypatch.setattr(dispatch, "instruction_set", lambda: None)
    assert fk.backends()["native"] == "not built, or switched off"
    with pytest.raises(
        ValueError, match="the compiled library is not there: install fedrot where there is a C\\+\\+ compiler"
    ):
        fk.align_average([x.float() for x in A], [x.float() for x in B], [1, 1], A_ref=A_ref, backend="native")


def test_the_switch_keeps_it_off():
    command = "import fedrot_kernels; print(fedrot_kernels.backends()['native'])"
    for value, expected in (("0", "not built, or switched off"), ("1", HERE)):
        said = subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, env={"FEDROT_NATIVE": value, "PATH": ""}
        )
        assert said.stdout.strip() == expected, said.stderr


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    """Its structures may have other fields: an editable install whose sources moved on would crash."""
    built = library.load()
    if built.fedrot_sources() == 0:
        pytest.skip("the library does not say what it was built from")
    assert built.fedrot_sources() == library.hash_sources()
    monkeypatch.setattr(library, "hash_sources", lambda: 1)
    with pytest.warns(UserWarning, match="was built from other sources and is not used; pip install fedrot anew"):
        assert library.load.__wrapped__() is None


def reflections(r, seed):
    """(n, r, r), float64, det < 0: at random, with close weakest directions, permutations, and with equal values."""
    generator = torch.Generator().manual_seed(seed)
    U, V = orthogonal(6, r, generator), orthogonal(6, r, generator)
    U[3:], V[3:] = torch.eye(r)[torch.randperm(r, generator=generator)], torch.eye(r)
    S = torch.linspace(3, 1, r, dtype=torch.float64).repeat(6, 1)
    if r > 1:
        S[1, -2] = S[1, -1] * 1.003
        S[[2, 4], : r - 1] = 1
        S[[2, 4], -1] = 0.5
    ones = torch.ones(r, r, dtype=torch.float64) + r * torch.eye(r, dtype=torch.float64)
    chain = 2 * torch.eye(r, dtype=torch.float64) - 0.9 * torch.ones(r, r, dtype=torch.float64).triu(1).tril(1)
    M = torch.cat([(U * S[:, None]) @ V.mT, ones[None], (chain + chain.T)[None]])
    M[:, 0] *= -torch.linalg.det(M / torch.linalg.matrix_norm(M, 2)[:, None, None] * 2).sign()[:, None]
    return M.float().double()


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("r", [1, 2, 3, 4, 7, 8, 16, 17, 33, 64, 128])
def test_flips_are_of_the_weakest_direction_on_every_instruction_set(r, instructions):
    """R where M determines it to 1e-4, as in test_exactness.py; its objective also among equal directions."""
    M = reflections(r, seed=r)
    zero = torch.zeros(len(M), 2, r)
    found = native([list(M.float())], [list(zero)], [1.0] * len(M), A_ref=[torch.eye(r)], instructions=instructions).R[0]
    S, determined = torch.linalg.svdvals(M), 0
    for m, R, s in zip(M, found.double(), S, strict=True):
        assert torch.linalg.det(R) > 0.99
        assert s.sum() - 2 * s[-1] - (R * m).sum() <= 2e-6 * s.sum()
        bound = EPS * s.norm() / (s[-2] - s[-1]) if r > 1 else EPS
        if bound <= 1e-4:
            determined += 1
            assert torch.linalg.matrix_norm(R - reference.special_orthogonal(m)) <= 1e-5 + 3 * bound
    assert determined >= 2


def test_flips_of_all_clients_do_not_multiply_the_cost_of_an_aggregation():
    """They add a fifth. Finding every eigenvector by Jacobi's rotations took over fifty times an aggregation."""
    r = 128
    generator = torch.Generator().manual_seed(0)
    turns = orthogonal(8, r, generator)
    turns[:, :, 0] *= -torch.linalg.det(turns).sign()[:, None]
    F = torch.randn(r, 1024, generator=generator)
    A, B = [list(turns.float() @ F)], [list(torch.zeros(8, 1024, r))]
    seconds = {True: [], False: []}
    for _ in range(7):
        for flipped, taken in seconds.items():
            start = time.process_time()
            native(A, B, [1.0] * 8, A_ref=[F], reflections=not flipped)
            taken.append(time.process_time() - start)
    assert statistics.median(seconds[True]) <= 3 * statistics.median(seconds[False])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_and_device_play_no_part(default):
    """The library writes float32, float64 and integers into memory of its own, whatever PyTorch makes by default."""
    A, B, A_ref, B_ref = model([(4, 33, 20), (16, 40, 30)], 3)
    sums = [(torch.zeros(1, *a[0].shape), torch.zeros(1, *b[0].shape)) for a, b in zip(A, B, strict=True)]

    def everything():
        aligned = fk.align_average(A, B, [1.0, 2.0, 3.0], A_ref=A_ref, strength=0.5, sketch_seed=11)
        plain = fk.average_factors(A, B, [1.0, 2.0, 3.0], sketch_seed=11)
        together = fk.align_together(A, B, [1.0, 2.0, 3.0], A_ref=A_ref, B_ref=B_ref, target="consensus", sketch_seed=11)
        for (sum_A, sum_B), a, b in zip(sums, A, B, strict=True):
            fk.add_client_(sum_A.zero_(), sum_B.zero_(), a[:1], b[:1], None, 1.5, sketch_seed=11)
        found = [*aligned.A, *aligned.B, *aligned.R, *plain.A, *plain.B, *together.A, *together.B]
        return [
            x.clone() for x in (*found, aligned.estimates.numbers, plain.estimates.squares, *(y for z in sums for y in z))
        ]

    expected = everything()
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    try:
        found = everything()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
