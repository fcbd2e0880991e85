"""``align_average`` and ``average`` with ``backend="triton"``: three launches, against the definitions in float64."""

from dataclasses import replace

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels import reference
from fedrot_kernels.tolerances import PRODUCT_FLOOR

from ..spectra import procrustes_gap
from ..test_whole_model import by_definition, model, refs
from .cases import (
    BOTH_MODELS,
    DEVICE,
    DTYPES,
    EPS,
    GPU,
    LAYOUTS,
    assert_as_accurate,
    place,
    rounding,
    shares,
    untouched_between,
)

pytestmark = pytest.mark.parametrize("triton_device", BOTH_MODELS, indirect=True)

# Padded rank 16 with smaller ones in between, 4 and 32; widths just beyond a tile and a slice, odd ones, one column.
MIXED = [(4, 33, 20), (1, 7, 1), (3, 65, 48), (8, 513, 33), (12, 64, 130)]
WIDE = [(4, 64, 520), (4, 1032, 8)]
MODELS = {"mixed": MIXED, "wide": WIDE, "rank 32": [(32, 136, 129), (24, 128, 120)]}
if GPU:
    MODELS |= {"rank 64": [(64, 512, 520), (33, 1025, 130)], "rank 128": [(128, 8192, 512), (100, 1001, 700)]}
SETTINGS = [  # aligned factor, reflections, λ: each of them with each of the others
    ("A", False, 0.5),
    ("B", True, 0.5),
    ("joint", False, 0.1),
    ("A", True, 1.0),
    ("B", False, 1.0),
    ("joint", True, 1.0),
    ("joint", False, 0.5),
]
CASES = [(dtype, setting) for dtype in DTYPES for setting in (SETTINGS if GPU or dtype == torch.float32 else SETTINGS[::3])]


def align(A, B, weights, A_ref, B_ref, on, layout="separate", ref_dtype=None, **settings):
    """``align_average`` by the kernels of factors on the CPU, and the clients as they were placed."""
    placed = place(A + B, layout)
    on_device = [[x.to(DEVICE, ref_dtype or x.dtype) for x in of_factor] for of_factor in (A_ref, B_ref)]
    given = refs(*on_device, on)
    return fk.align_average(placed[: len(A)], placed[len(A) :], weights, **given, **settings, backend="triton"), placed


def check(result, A, B, weights, A_ref, B_ref, on, reflections, strength):
    """Means to rounding, given the rotations; rotations as close to the definition's as those of PyTorch."""
    n, w, settings = len(weights), shares(weights), {"strength": strength, "reflections": reflections}
    torch_R = fk.align_average(A, B, weights, **refs(A_ref, B_ref, on), **settings, backend="torch").R
    assert bool(result.finite) and result.residual.shape == (len(A), n) and result.residual.max() <= 1e-6
    assert untouched_between([*result.A, *result.B])
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        r, R = a.shape[1], result.R[i].cpu()
        assert R.dtype == torch.float32 and R.shape == (n, r, r)
        for mean, F in ((result.A[i], a), (result.B[i].mT, b.mT)):
            assert mean.dtype == a.dtype
            exact, theirs = (
                reference.rotate_average(list(F.to(x)), list(R.to(x)), w.tolist()) for x in (torch.float64, torch.float32)
            )
            magnitude = reference.rotate_average(list(F.double().abs()), list(R.double().abs()), w.tolist())
            assert_as_accurate(mean, theirs, exact, rounding(n * r) * magnitude)
        truth = by_definition(a, b, A_ref[i], B_ref[i], weights, on, strength, reflections, torch.float64)[2]
        # M is known to rounding only, which R shows amplified by κ(M), here below 30.
        assert (R - truth).abs().max() <= (torch_R[i] - truth).abs().max() + 30 * r**0.5 * EPS, i


@pytest.mark.parametrize(("dtype", "setting"), CASES)
@pytest.mark.parametrize("name", MODELS)
def test_align_average_is_what_the_definitions_say(name, dtype, setting):
    factors, weights, (on, reflections, strength) = model(MODELS[name], 3, dtype), [1.0, 2.0, 4.5], setting
    result, _ = align(*factors[:2], weights, *factors[2:], on, reflections=reflections, strength=strength)
    check(result, *factors[:2], weights, *factors[2:], on, reflections, strength)


@pytest.mark.parametrize(("dtype", "on"), list(zip(DTYPES, ["joint", "A", "B"][: len(DTYPES)], strict=True)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout, on, dtype):
    for shapes in (MIXED[:3], WIDE):
        A, B, A_ref, B_ref = model(shapes, 3, dtype)
        result, placed = align(A, B, [1, 0, 2], A_ref, B_ref, on, layout)
        check(result, A, B, [1, 0, 2], A_ref, B_ref, on, False, 1.0)
        for clients, before in zip(placed, A + B, strict=True):  # the inputs are as they were
            assert all(torch.equal(x.cpu(), y) for x, y in zip(clients, before, strict=True))


@pytest.mark.parametrize("n", [1, 2, 50, *([1000] if GPU else [])])
def test_any_number_of_clients(n):
    A, B, A_ref, B_ref = model([(4, 33, 20), (2, 64, 8)], n)
    weights = [float(i % 4) for i in range(1, n + 1)]
    result, _ = align(A, B, weights, A_ref, B_ref, "joint", "stacked", strength=0.5)
    check(result, A, B, weights, A_ref, B_ref, "joint", False, 0.5)


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("on", ["A", "B"])
def test_one_column_adapters(on, reflections):
    """M has rank one; where it says nothing, R is the one nearest the identity."""
    A, B, A_ref, B_ref = model([(4, 1, 1), (12, 1, 40), (1, 1, 1)], 3)
    settings = {"reflections": reflections, "strength": 1.0}
    result, _ = align(A, B, [1, 2, 3], A_ref, B_ref, on, **settings)
    plain = fk.align_average(A, B, [1, 2, 3], **refs(A_ref, B_ref, on), **settings, backend="torch")
    assert bool(result.finite) and result.residual.max() <= 1e-6
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        problem = (a, b, A_ref[i], B_ref[i], [1, 2, 3], on, 1.0, reflections)
        R, truth = result.R[i].cpu(), by_definition(*problem, torch.float64)[2]
        # Rounding of M, one eps, turns the directions that the floor keeps still.
        assert (R - truth).abs().max() <= (plain.R[i] - truth).abs().max() + EPS / PRODUCT_FLOOR[torch.float32]
        if len(R[0]) > 1:  # in one dimension SO(r) leaves no choice
            M = a @ A_ref[i].T if on == "A" else b.mT @ B_ref[i]
            assert procrustes_gap(M, R) <= 2e-6


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("on", ["A", "B", "joint"])
def test_empty_clients_and_references_do_not_rotate(on, strength):
    A, B, A_ref, B_ref = model(MIXED[:3], 3)
    for x in (*A, *B):
        x[1] = 0
    result, _ = align(A, B, [1, 2, 3], A_ref, B_ref, on, strength=strength)
    assert bool(result.finite)
    zero = [[torch.zeros_like(x) for x in of_factor] for of_factor in (A_ref, B_ref)]
    rests, _ = align(A, B, [1, 2, 3], *zero, on, strength=strength)
    assert bool(rests.finite)
    for i, (r, *_) in enumerate(MIXED[:3]):
        for R in (result.R[i][1].cpu(), rests.R[i].cpu()):
            eye = torch.eye(r).expand_as(R)
            if strength == 1:
                assert torch.equal(R, eye)
            else:  # softening computes with it
                torch.testing.assert_close(R, eye, atol=2 * EPS, rtol=0)
    for mean, x in zip((*rests.A, *rests.B), (*A, *B), strict=True):
        exact = torch.tensordot(shares([1, 2, 3]), x.double(), 1)
        assert (mean.cpu() - exact).abs().max() <= 8 * EPS * x.abs().max()


def test_joint_with_a_reference_of_which_one_factor_is_zero():
    A, B, A_ref, B_ref = model(MIXED[:3], 3)
    zero = [torch.zeros_like(x) for x in B_ref]
    joint, _ = align(A, B, [1, 2, 3], A_ref, zero, "joint")
    alone, _ = align(A, B, [1, 2, 3], A_ref, B_ref, "A")
    assert len(joint.R) == 3
    for x, y in zip(joint.R, alone.R, strict=True):
        assert (x - y).abs().max() <= 1e-5  # rounding of M, whose scale differs


@pytest.mark.parametrize("on", ["A", "B", "joint"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ref_dtype", [torch.float16, torch.float32, torch.float64])
def test_references_may_have_another_dtype(ref_dtype, dtype, on):
    A, B, A_ref, B_ref = model(MIXED[:3], 3, dtype)
    A_ref, B_ref = ([x.half().to(ref_dtype) for x in of_factor] for of_factor in (A_ref, B_ref))
    result, _ = align(A, B, [1, 2, 3], A_ref, B_ref, on)
    check(result, A, B, [1, 2, 3], A_ref, B_ref, on, False, 1.0)


def test_one_of_two_references_may_have_another_dtype():
    A, B, A_ref, B_ref = model(MIXED[:3], 3, torch.float16)
    B_ref = [x.float() for x in B_ref]
    result, _ = align(A, B, [1, 2, 3], A_ref, B_ref, "joint")
    check(result, A, B, [1, 2, 3], A_ref, B_ref, "joint", False, 1.0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_inputs_give_the_same_bits(dtype, name, device):
    """Without a card once more with CTAs and warps in reverse order, and other garbage where nothing was written."""
    A, B, A_ref, B_ref = model(MODELS[name], 3, dtype)
    results = []
    for turn in range(20 if GPU else 2):
        if not GPU:
            device.settings = replace(device.settings, reverse=turn == 1)
        results.append(align(A, B, [1, 2, 3], A_ref, B_ref, "joint", strength=0.5)[0])
    assert len(results[0].R) == len(A)
    for other in results[1:]:
        assert torch.equal(other.residual, results[0].residual)
        for x, y in zip(results[0].A + results[0].B + results[0].R, other.A + other.B + other.R, strict=True):
            assert torch.equal(x, y)


def test_adapters_of_several_dtypes_in_one_call():
    """What is launched per dtype comes back in the order given, and is what each dtype alone gives."""
    factors = [model(MIXED[:2], 3, dtype, seed=i) for i, dtype in enumerate((torch.float32, torch.float16))]
    order = [(1, 0), (0, 0), (1, 1), (0, 1)]
    A, B, A_ref, B_ref = ([factors[k][x][i] for k, i in order] for x in range(4))
    mixed, _ = align(A, B, [1, 2, 3], A_ref, B_ref, "A")
    for k in (0, 1):
        alone, _ = align(*factors[k][:2], [1, 2, 3], *factors[k][2:], "A")
        for i in (0, 1):
            place_of = order.index((k, i))
            assert torch.equal(mixed.A[place_of], alone.A[i]) and torch.equal(mixed.B[place_of], alone.B[i])
            assert torch.equal(mixed.R[place_of], alone.R[i]) and torch.equal(mixed.residual[place_of], alone.residual[i])


@pytest.mark.parametrize(("factor", "value"), [("A", torch.nan), ("B", torch.nan), ("B", torch.inf)])
@pytest.mark.parametrize("on", ["A", "B", "joint"])
def test_what_is_not_finite_shows_where_it_belongs(on, factor, value):
    """Even at weight zero; other adapters, and the rotations of other clients, keep their bits."""
    adapter, client, shapes = 1, 1, [(4, 33, 20), (3, 65, 48), (8, 513, 33)]
    A, B, A_ref, B_ref = model(shapes, 3)
    clean, _ = align(A, B, [1, 0, 1], A_ref, B_ref, on)
    {"A": A, "B": B}[factor][adapter][client].view(-1)[-1] = value
    result, _ = align(A, B, [1, 0, 1], A_ref, B_ref, on)
    assert not bool(result.finite)
    expected = torch.zeros(len(shapes), 3, dtype=torch.bool, device=DEVICE)
    expected[adapter, client] = on in (factor, "joint")  # what is not in M does not harm R
    assert torch.equal(result.residual.isnan(), expected)
    assert torch.equal(result.residual[~expected], clean.residual[~expected])
    for i in range(len(shapes)):
        assert torch.equal(result.R[i][~expected[i]], clean.R[i][~expected[i]])
        assert result.R[i][expected[i]].isnan().all()
        if i != adapter:
            assert torch.equal(result.A[i], clean.A[i]) and torch.equal(result.B[i], clean.B[i])
    assert not {"A": result.A, "B": result.B}[factor][adapter].isfinite().all()


def test_an_average_that_overflows_its_dtype_is_not_finite():
    A, B, A_ref, B_ref = model([(2, 30, 20)], 1, torch.float16)
    A[0].fill_(60000)
    A_ref[0].fill_(1)
    A_ref[0][1] = 0  # R turns (1, 1) into (√2, 0): 85,000
    result, _ = align(A, B, [1], A_ref, B_ref, "A")
    assert result.residual.max() <= 1e-6
    assert not bool(result.finite) and result.A[0][0].isinf().all() and result.B[0].isfinite().all()


@pytest.mark.parametrize("weights", [[1.0, 2.0, 4.5], [0.0, 1e-30, 1e30], torch.tensor([3, 2, 1])])
def test_average_takes_any_weights(weights):
    stacks = [x for dtype in DTYPES for x in model(MIXED[:3], 3, dtype)[0]]
    stacks[0][0] = 0 if weights[0] else stacks[0][0]
    given = weights.to(DEVICE) if isinstance(weights, torch.Tensor) else weights
    means, finite = fk.average(place(stacks, "separate"), given, backend="triton")
    assert bool(finite)
    w = shares(weights)
    for mean, x in zip(means, stacks, strict=True):
        exact, theirs = (torch.tensordot(w.to(y), x.to(y), 1) for y in (torch.float64, torch.float32))
        assert_as_accurate(mean, theirs, exact, rounding(3) * torch.tensordot(w, x.double().abs(), 1))
