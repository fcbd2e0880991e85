"""What only a card can show: graphs, streams, and offsets beyond 2³¹ elements."""

import pytest
import torch

import fedrot_kernels as fk

from ..test_whole_model import model
from .cases import DEVICE, DTYPES, GPU, place

pytestmark = pytest.mark.skipif(not GPU, reason="needs a card")

SHAPES = [(4, 33, 20), (1, 7, 1), (8, 513, 33), (16, 1024, 512)]


def factors(dtype=torch.float32, shapes=SHAPES, n=4, seed=0):
    A, B, A_ref, B_ref = model(shapes, n, dtype, seed=seed)
    return [place(x, "separate") for x in (A, B)] + [[x.to(DEVICE) for x in of_factor] for of_factor in (A_ref, B_ref)]


def bits(result):
    return [x.clone() for x in (*result.A, *result.B, *result.R, result.residual, result.finite)]


def assert_same(results, others):
    assert all(torch.equal(x, y) for x, y in zip(results, others, strict=True))


def update(target, source):
    """The values of one into the memory of the other."""
    for x, y in zip(target, source, strict=True):
        x.copy_(y) if isinstance(x, torch.Tensor) else update(x, y)


def call(x, weights, strength=0.5):
    return fk.align_average(x[0], x[1], weights, A_ref=x[2], B_ref=x[3], strength=strength, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_replays_with_other_numbers(dtype):
    captured, other = factors(dtype), factors(dtype, seed=1)
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0], device=DEVICE)
    first = bits(call(captured, weights))  # compiles, and puts the tables on the device
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(captured, weights)
    graph.replay()
    assert_same(bits(result), first)
    update(captured, other)
    weights.copy_(torch.tensor([0.0, 1.0, 5.0, 1.0], device=DEVICE))
    graph.replay()
    assert_same(bits(result), bits(call(other, weights)))
    for seed in range(2, 22):  # tables of other tensors push those of the graph out of the cache, not out of memory
        call(factors(dtype, SHAPES[:1], seed=seed), weights)
    graph.replay()
    assert_same(bits(result), bits(call(other, weights)))


def test_tensors_that_are_new_in_a_graph_are_refused():
    x, weights = factors(), torch.ones(4, device=DEVICE)
    call(factors(seed=3), weights)
    with pytest.raises(RuntimeError, match="call once before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        call(x, weights)


def test_streams_do_not_disturb_each_other():
    inputs, weights = [factors(seed=seed) for seed in range(4)], torch.tensor([1.0, 2.0, 0.5, 3.0], device=DEVICE)
    expected = [bits(call(x, weights)) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results = []
    for _ in range(5):
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(x, weights))
    torch.cuda.synchronize()
    assert len(results) == 5 * len(inputs)
    for i, result in enumerate(results):
        assert_same(bits(result), expected[i % len(inputs)])


def test_nothing_waits_for_the_gpu():
    x, weights = factors(), torch.ones(4, device=DEVICE)
    expected = bits(call(x, weights))
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = call(x, weights)
        fk.average(x[0], weights, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(bits(result), expected)


def large(*shape):
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_more_than_two_to_the_31_elements(factor):
    """One factor of more than 2³¹ elements, of two clients: 8.6 GB, and as much again for its reference and average."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    r, d, n = 16, 2**27 + 40, 2
    shape = (r, d) if factor == "A" else (d, r)
    clients, ref = [large(*shape) for _ in range(n)], large(*shape)
    small = [[large(*((1, r) if factor == "A" else (r, 1))) for _ in range(n)]]
    A, B = ([clients], small) if factor == "A" else (small, [clients])
    given = {"A_ref": [ref]} if factor == "A" else {"B_ref": [ref]}
    result = fk.align_average(A, B, [1.0, 3.0], **given, backend="triton")
    assert bool(result.finite) and result.residual.max() <= 1e-6
    frames, F_ref = ([x if factor == "A" else x.mT for x in clients]), (ref if factor == "A" else ref.mT)
    mean = result.A[0] if factor == "A" else result.B[0].mT
    for i, F in enumerate(frames):
        M = sum(F[:, s : s + 2**22].double() @ F_ref[:, s : s + 2**22].double().mT for s in range(0, d, 2**22))
        R = result.R[0][i].double()
        U, S, Vh = torch.linalg.svd(M)
        gap = (S.sum() - torch.where(torch.linalg.det(U @ Vh) < 0, 2 * S[-1], 0) - (R * M).sum()) / S.sum()
        assert gap.abs() <= 1e-3  # as SO(r) in general: see the tests of polar
    for start in (0, d // 2, d - 1000):
        c = slice(start, start + 1000)
        R = result.R[0].double()
        exact = 0.25 * R[0].mT @ frames[0][:, c].double() + 0.75 * R[1].mT @ frames[1][:, c].double()
        assert ((mean[:, c] - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-6).all()


def test_a_plain_mean_of_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    size = 2**31 + 1001
    clients = [large(size) for _ in range(2)]
    (mean,), finite = fk.average([clients], [1.0, 3.0], backend="triton")
    assert bool(finite)
    exact = 0.25 * clients[0][-5000:].double() + 0.75 * clients[1][-5000:].double()
    assert ((mean[-5000:] - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-6).all()
