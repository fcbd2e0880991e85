"""Whole-model alignment and averaging against the definitions, one adapter at a time in float64."""

import math

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels import reference

from .spectra import orthogonal

pytestmark = pytest.mark.usefixtures("cpu_backend")

# Ranks and widths that differ between adapters, odd ones, one column, and of a size that is not stacked.
RAGGED = [(4, 33, 20), (4, 33, 20), (1, 7, 1), (3, 64, 48), (16, 40, 40), (4, 4096, 8), (8, 24, 4096), (8, 2051, 2049)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Relative to a tensor's largest entry: what Newton-Schulz may lose beyond what an SVD in the same dtype loses.
EXTRA = {torch.float32: 3e-6, torch.float64: 1e-12}


def working(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def model(shapes, n, dtype=torch.float32, seed=0):
    """Per adapter A (N, r, d_in), B (N, d_out, r) and references: clients near them, each in a basis of its own."""
    generator = torch.Generator().manual_seed(seed)
    A, B, A_ref, B_ref = [], [], [], []
    for r, d_in, d_out in shapes:
        a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((r, d_in), (d_out, r)))
        Q = orthogonal(n, r, generator)
        Q[..., 0] *= torch.linalg.det(Q).sign()[:, None]
        Q = fk.soften(Q, 0.5)  # by 90° at most, where no soft rotation is ill-conditioned
        drift = [0.2 * torch.randn(n, *x.shape, generator=generator, dtype=torch.float64) for x in (a, b)]
        A.append((Q.mT @ (a + drift[0])).to(dtype))
        B.append(((b + drift[1]) @ Q).to(dtype))
        A_ref.append(a.to(dtype))
        B_ref.append(b.to(dtype))
    return A, B, A_ref, B_ref


def by_definition(A, B, A_ref, B_ref, weights, on, strength, reflections, dtype):
    """Means of one adapter; float64 is the truth, a lower dtype shows what plain torch loses."""
    A, B, A_ref, B_ref = A.to(dtype), B.to(dtype), A_ref.to(dtype), B_ref.to(dtype)
    R = []
    for a, b in zip(A, B, strict=True):
        M_A, M_B = reference.cross_covariance(a, A_ref), reference.cross_covariance(b.T, B_ref.T)
        M = {"A": M_A, "B": M_B, "joint": M_A / A_ref.square().sum() + M_B / B_ref.square().sum()}[on]
        R.append(reference.soften(reference.polar(M) if reflections else reference.special_orthogonal(M), strength))
    mean_B = reference.rotate_average([b.T for b in B], R, weights).T
    return reference.rotate_average(list(A), R, weights), mean_B, torch.stack(R)


def refs(A_ref, B_ref, on):
    return {"A_ref": A_ref if on != "B" else None, "B_ref": B_ref if on != "A" else None}


def separate(stacked):
    return [[x.clone() for x in of_clients] for of_clients in stacked]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize(("on", "reflections", "strength"), [("A", False, 0.5), ("B", False, 1.0), ("joint", True, 0.8)])
@pytest.mark.parametrize("layout", ["stacked", "separate"])
def test_align_average_is_what_the_definitions_say(layout, on, reflections, strength, n, dtype):
    A, B, A_ref, B_ref = model(RAGGED, n, dtype)
    weights = [float(i % 4 + 1) for i in range(n)]
    given = (A, B) if layout == "stacked" else (separate(A), separate(B))
    result = fk.align_average(*given, weights, **refs(A_ref, B_ref, on), strength=strength, reflections=reflections)
    assert bool(result.finite) and result.residual.shape == (len(RAGGED), n) and result.residual.max() <= 1e-6
    for i in range(len(RAGGED)):
        problem = (A[i], B[i], A_ref[i], B_ref[i], weights, on, strength, reflections)
        truth, plain = by_definition(*problem, torch.float64), by_definition(*problem, working(dtype))
        for mean, exact, theirs in zip((result.A[i], result.B[i]), truth[:2], plain[:2], strict=True):
            assert mean.dtype == dtype and mean.shape == exact.shape
            bound = (theirs.to(dtype) - exact).abs().max() + EXTRA[working(dtype)] * exact.abs().max()
            assert (mean - exact).abs().max() <= bound, i
        assert result.R[i].dtype == working(dtype) and result.R[i].shape == truth[2].shape
        if n > 1:  # the clients' bases are found, so that averaging loses little: not so without rotation
            assert (result.R[i] - truth[2]).abs().max() <= 1e-4


@pytest.mark.parametrize("on", ["A", "B"])
def test_clients_in_any_memory_layout_give_the_same(on):
    A, B, A_ref, B_ref = model(RAGGED, 3)
    expected = fk.align_average(separate(A), separate(B), [1, 2, 3], **refs(A_ref, B_ref, on))
    transposed = [[x.mT.contiguous().mT for x in of_clients] for of_clients in (*A, *B)]
    strided = [torch.stack([of_clients] * 2, dim=2)[:, :, 0] for of_clients in (*A, *B)]
    last = [of_clients.permute(1, 2, 0).contiguous().permute(2, 0, 1) for of_clients in (*A, *B)]
    assert len(expected.A) == len(expected.B) == len(RAGGED)
    for given in (transposed, strided, last, [*A, *B]):
        result = fk.align_average(given[: len(A)], given[len(A) :], [1, 2, 3], **refs(A_ref, B_ref, on))
        for x, y in zip(result.A + result.B, expected.A + expected.B, strict=True):
            assert (x - y).abs().max() <= 3e-6 * y.abs().max()


@pytest.mark.parametrize("on", ["A", "B"])
def test_the_same_inputs_give_the_same_bits_and_results_of_their_own(on):
    A, B, A_ref, B_ref = model(RAGGED, 3)
    given = [separate(A), separate(B)]
    before = [[[x.clone() for x in of_clients] for of_clients in factor] for factor in given]
    first, second = (fk.align_average(*given, [1, 2, 3], **refs(A_ref, B_ref, on)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first.A + first.B + first.R, second.A + second.B + second.R, strict=True))
    storages = {x.untyped_storage().data_ptr() for result in (first, second) for x in result.A + result.B}
    assert len(storages) == 4 * len(RAGGED)
    assert not storages & {x.untyped_storage().data_ptr() for factor in given for of in factor for x in of}
    assert all(
        torch.equal(x, y)
        for now, then in zip(given, before, strict=True)
        for of_now, of_then in zip(now, then, strict=True)
        for x, y in zip(of_now, of_then, strict=True)
    )


def test_adapters_do_not_affect_each_other():
    """What is worked on together, and in what order, does not matter."""
    A, B, A_ref, _ = model(RAGGED, 3)
    together = fk.align_average(separate(A), separate(B), [1, 1, 2], A_ref=A_ref)
    order = [7, 3, 5, 1, 0, 6, 2, 4]
    mixed = fk.align_average(*(separate([x[i] for i in order]) for x in (A, B)), [1, 1, 2], A_ref=[A_ref[i] for i in order])
    for place, i in enumerate(order):
        assert torch.equal(mixed.residual[place], together.residual[i])
        assert (mixed.A[place] - together.A[i]).abs().max() <= 3e-6 * together.A[i].abs().max()
        assert (mixed.R[place] - together.R[i]).abs().max() <= 1e-6


@pytest.mark.parametrize("layout", ["stacked", "separate"])
@pytest.mark.parametrize("adapter", [0, 5, 7])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("on", ["A", "B"])
def test_what_is_not_finite_shows_even_at_weight_zero(on, factor, value, adapter, layout):
    A, B, A_ref, B_ref = model(RAGGED, 3)
    {"A": A, "B": B}[factor][adapter][1].view(-1)[-1] = value
    given = (A, B) if layout == "stacked" else (separate(A), separate(B))
    result = fk.align_average(*given, [1, 0, 1], **refs(A_ref, B_ref, on))
    assert not bool(result.finite)
    expected = torch.zeros(len(RAGGED), 3, dtype=torch.bool)
    expected[adapter, 1] = factor == on  # what is not in M does not harm R
    assert torch.equal(result.residual.isnan(), expected)
    for i in set(range(len(RAGGED))) - {adapter}:
        assert result.A[i].isfinite().all() and result.B[i].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e308])
def test_only_the_ratio_of_weights_matters(scale):
    A, B, A_ref, _ = model(RAGGED, 3)
    expected = fk.align_average(A, B, torch.tensor([1, 1, 0.5]), A_ref=A_ref)
    result = fk.align_average(A, B, [scale, scale, scale / 2], A_ref=A_ref)
    assert len(result.A) == len(result.B) == len(RAGGED)
    for x, y in zip(result.A + result.B, expected.A + expected.B, strict=True):
        assert (x - y).abs().max() <= 1e-6 * y.abs().max()


def test_a_reference_of_zero_does_not_rotate():
    A, B, A_ref, B_ref = model(RAGGED[:4], 3)
    zero = [torch.zeros_like(x) for x in B_ref]
    result = fk.align_average(A, B, [1, 2, 3], B_ref=zero)
    joint, alone = (fk.align_average(A, B, [1, 2, 3], A_ref=A_ref, B_ref=b) for b in (zero, None))
    for i, (r, _, _) in enumerate(RAGGED[:4]):
        assert torch.equal(result.R[i], torch.eye(r).expand(3, r, r))
        assert (joint.R[i] - alone.R[i]).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_references_may_have_another_dtype(dtype):
    A, B, A_ref, B_ref = model(RAGGED, 3, torch.float16)
    expected = fk.align_average(A, B, [1, 2, 3], A_ref=A_ref, B_ref=B_ref)
    result = fk.align_average(A, B, [1, 2, 3], A_ref=[x.to(dtype) for x in A_ref], B_ref=[x.double() for x in B_ref])
    if dtype != torch.bfloat16:
        assert all(torch.equal(x, y) for x, y in zip(result.A + result.R, expected.A + expected.R, strict=True))
    assert {x.dtype for x in result.A} == {torch.float16} and {x.dtype for x in result.R} == {torch.float32}


@pytest.mark.parametrize("layout", ["stacked", "separate"])
@pytest.mark.parametrize("weights", [[1.0, 2.0, 4.5], [0.0, 1e-30, 1e30], [1e308] * 3, torch.tensor([3, 2, 1])])
def test_average_is_the_weighted_mean(weights, layout):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (), (7,), (0, 2), (2, 3, 4), (300, 100)]
    tensors = [torch.randn(3, *shape, generator=generator).to(dtype) for dtype in DTYPES for shape in shapes]
    means, finite = fk.average(tensors if layout == "stacked" else separate(tensors), weights)
    w = torch.as_tensor(weights, dtype=torch.float64)
    w = w / w.max()
    w = w / w.sum()
    assert bool(finite) and finite.dtype == torch.bool and finite.shape == ()
    for mean, x in zip(means, tensors, strict=True):
        exact = torch.tensordot(w, x.double(), 1)
        assert (mean.dtype, mean.shape) == (x.dtype, exact.shape)
        eps = torch.finfo(x.dtype).eps / 2 * exact.abs() + 4 * torch.finfo(working(x.dtype)).eps * x.abs().amax(0).double()
        assert ((mean.double() - exact).abs() <= eps).all()
    tensors[5][1].view(-1)[3] = math.inf
    means, finite = fk.average(tensors, [1, 0, 1])
    assert not bool(finite)
    assert [bool(mean.isfinite().all()) for mean in means] == [i != 5 for i in range(len(means))]


def test_an_average_that_overflows_its_dtype_is_not_finite():
    A, B, A_ref, _ = model([(2, 30, 20)], 1)
    large = [torch.full_like(x, 60000).half() for x in A]
    result = fk.align_average(large, [x.half() for x in B], [1], A_ref=A_ref, strength=1.0)
    assert not bool(result.finite) and result.residual.max() <= 1e-6


GOOD = model([(2, 6, 5), (3, 4, 4)], 2)
WRONG = {
    "no reference": (lambda a: a.update(A_ref=None), "A_ref, B_ref or both"),
    "no adapters": (lambda a: a.update(A=[], B=[], A_ref=[]), "at least one client"),
    "no clients": (lambda a: a.update(A=[x[:0] for x in a["A"]]), "at least one client"),
    "adapters missing": (lambda a: a.update(B=a["B"][:1]), r"\[2, 1, 2\]"),
    "clients missing": (lambda a: a["B"].__setitem__(1, a["B"][1][:1]), "adapter 1, B: 1 clients, but 2"),
    "ranks": (lambda a: a["B"].__setitem__(1, torch.ones(2, 4, 5)), r"adapter 1: .*\(3, 4\) and B \(4, 5\)"),
    "no matrix": (lambda a: a["A"].__setitem__(0, torch.ones(2, 6)), r"adapter 0: .*A \(6,\)"),
    "empty": (lambda a: a["B"].__setitem__(0, torch.ones(2, 0, 2)), r"adapter 0: .*B \(0, 2\)"),
    "shapes of clients": (
        lambda a: a["A"].__setitem__(1, [torch.ones(3, 4), torch.ones(3, 5)]),
        r"adapter 1, A: clients of the shapes .*\(3, [45]\) and \(3, [45]\)",
    ),
    "dtypes of clients": (
        lambda a: a["A"].__setitem__(1, [torch.ones(3, 4), torch.ones(3, 4).half()]),
        "adapter 1, A: clients of the dtypes torch.float",
    ),
    "dtypes": (lambda a: a["B"].__setitem__(0, a["B"][0].double()), "adapter 0: A is torch.float32 and B torch.float64"),
    "reference": (lambda a: a["A_ref"].__setitem__(1, torch.ones(3, 5)), r"adapter 1: A_ref is \(3, 5\), .*\(3, 4\)"),
    "weights too few": (lambda a: a.update(weights=[1]), "2 finite numbers"),
    "weights negative": (lambda a: a.update(weights=[1, -1]), "non-negative"),
    "weights zero": (lambda a: a.update(weights=torch.zeros(2)), "not all zero"),
    "weights NaN": (lambda a: a.update(weights=[math.nan, 1]), "finite"),
    "strength": (lambda a: a.update(strength=1.5), "between 0 and 1, got 1.5"),
    "backend": (lambda a: a.update(backend="cuda"), "auto, native, torch or triton, got 'cuda'"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_names_the_adapter(spoil, message):
    A, B, A_ref, _ = GOOD
    arguments = {"A": list(A), "B": list(B), "weights": [1, 2], "A_ref": list(A_ref)}
    fk.align_average(**arguments)
    spoil(arguments)
    with pytest.raises(ValueError, match=message):
        fk.align_average(**arguments)


def test_wrong_input_to_average_names_the_tensor():
    with pytest.raises(ValueError, match="nothing to average"):
        fk.average([], [])
    with pytest.raises(ValueError, match="tensor 1: 3 clients, but 2"):
        fk.average([torch.ones(2, 4), torch.ones(3, 4)], [1, 1])
    with pytest.raises(ValueError, match=r"tensor 0: clients of the shapes \((2,\) and \(3,|3,\) and \(2,)\)"):
        fk.average([[torch.ones(2), torch.ones(3)]], [1, 1])
    with pytest.raises(TypeError, match=r"tensor 0: .*int64"):
        fk.average([torch.ones(2, 4).long()], [1, 1])
    with pytest.raises(ValueError, match="2 finite numbers"):
        fk.average([torch.ones(2, 4)], [1, 1, 1])
    with pytest.raises(ValueError, match="use torch"):
        fk.average([torch.ones(2, 4).double()], [1, 1], backend="triton")


def test_tensors_of_two_devices_are_refused_by_name():
    A, B, A_ref, _ = model([(2, 5, 4), (3, 6, 4)], 2)
    elsewhere = [A[0], [A[1][0], A[1][1].to("meta")]]
    with pytest.raises(ValueError, match=r"adapter 1, A: on .*meta.*, the first on cpu; move them to one device"):
        fk.align_average(elsewhere, B, [1, 1], A_ref=A_ref)
    with pytest.raises(ValueError, match=r"tensor 1: on meta, the first on cpu"):
        fk.average([A[0], A[1].to("meta")], [1, 1])
