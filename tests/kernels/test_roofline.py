"""The roofline counts what is known of small kernels, and its record is of these kernels and is what the page shows."""

import json

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.bounds import BOUNDS, beside, card_of, lines
from benchmarks.cards import CARDS
from benchmarks.compile_matrix import sources_digest
from benchmarks.gpu_roofline import steps
from benchmarks.roofline import PAGE, with_table
from benchmarks.roofline_counts import Case, Counted, count, counted
from benchmarks.roofline_sass import compile_ptx
from tests.kernels.executor import Settings, executed, kernels, why_not
from tests.kernels.executor.ptx import parse

needs_compiler = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
H100 = CARDS["H100"]


@needs_compiler
def test_a_sum_moves_its_bytes_and_nothing_else():
    with executed(90, Settings(counting=True)) as device:
        x, y, out = torch.ones(4096), torch.ones(4096), torch.empty(4096)
        kernels.add[(8,)](x, y, out, 4096, 512, num_warps=4)
    found = counted(*device.launches[0], ctas=8)
    assert found.per_cta["memory"] == found.per_cta["L2"] == 3 * 512 * 4
    assert found.per_cta["shared memory"] == 3 * 512 * 4 / 128  # the path of global requests, 128 bytes a clock
    assert found.per_cta["tensor cores"] == found.per_cta["special functions"] == 0
    assert found.times(H100)["memory"] == pytest.approx(3 * 4096 * 4 / 3.35e12)


@needs_compiler
@pytest.mark.parametrize(("precision", "times"), [("tf32", 1), ("tf32x3", 3)])
def test_tensor_cores_take_the_products_that_there_are(precision, times):
    """64 × 64 × 32 multiply-adds, 1024 a clock, whether one instruction is of a warp or of four."""
    for warps in (1, 4):
        with executed(90, Settings(counting=True)) as device:
            x, y, out = torch.ones(64, 32), torch.ones(32, 64), torch.empty(64, 64)
            kernels.product[(1,)](x, y, out, 64, 64, 32, 32, False, False, precision, num_warps=warps)
        assert counted(*device.launches[0], ctas=1).per_cta["tensor cores"] == times * 64 * 64 * 32 / 1024


LOOP = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry loop(
	.param .u64 .ptr .global .align 16 loop_param_0,
	.param .u32 loop_param_1
)
.reqntid 32
{
	.reg .pred 	%p<2>;
	.reg .b32 	%r<8>;
	.reg .b64 	%rd<2>;
	ld.param.b64 	%rd1, [loop_param_0];
	ld.param.b32 	%r1, [loop_param_1];
	ld.global.b32 	%r2, [%rd1];
	mov.b32 	%r3, 0;
$L__BB0_1:
	fma.rn.f32 	%r2, %r2, %r2, %r2;
	add.s32 	%r3, %r3, 1;
	setp.lt.s32 	%p1, %r3, %r1;
	@%p1 bra 	$L__BB0_1;
	st.global.b32 	[%rd1], %r2;
	ret;
}
"""


def test_what_ptxas_unrolls_is_counted_once():
    """ptxas makes four steps of one, and a second loop for the rest; a step is still one product."""
    kernel = parse(LOOP)
    compiled = compile_ptx(kernel)
    assert "FFMA" in compiled.sass and compiled.sass.count("FFMA") > 1
    found = {s.name: n for s, n in zip(kernel.statements, compiled.instructions, strict=True)}
    assert 1 <= found["fma.rn.f32"] < 1.3  # a copy may have a move beside it
    assert sum(found[name] for name in ("add.s32", "setp.lt.s32", "bra")) < 3
    assert 0 < compiled.registers < 255 and compiled.stack == 0


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "resident"), [(255, 4, 0, 2), (128, 4, 0, 4), (32, 1, 0, 32), (32, 4, 100_000, 2)]
)
def test_how_many_programs_a_multiprocessor_holds(registers, warps, shared, resident):
    assert H100.resident(registers, warps, shared) == resident


def test_one_warp_takes_turns():
    """5 CTAs for each place of an SM, 400 clocks of issue, four instructions a clock, by one warp that issues one."""
    kernel = Counted("polar", 5 * 132 * 8, 1, 255, 0, 0, {"issue": 100.0}, 1.0, 0.0)
    assert kernel.one_warp(H100) == pytest.approx(5 * 400 / H100.clock)


@needs_compiler
def test_an_aggregation_moves_every_factor_once_and_the_aligned_one_twice():
    case = Case(torch.float32, 8, 512, 3, 4)
    cross, polar, average = count(case)
    must, frame = case.workload.aligned_bytes(case.dtype), 4 * 8 * 512 * 4
    moved = {kernel.kernel: kernel.ctas * kernel.per_cta["memory"] for kernel in (cross, polar, average)}
    assert moved["cross_covariance"] + moved["rotate_average"] == pytest.approx(must, rel=0.03)  # M, R and tables besides
    assert moved["cross_covariance"] == pytest.approx(4 * frame, rel=0.05)
    assert (cross.ctas, polar.ctas, average.ctas) == (4, 6, 2 * 4 * 4)


def test_the_record_is_of_these_kernels_and_is_what_the_page_shows():
    record = json.loads(BOUNDS.read_text("utf-8"))
    assert record["sources"] == sources_digest(), "run python -m benchmarks.roofline"
    page = PAGE.read_text("utf-8")
    assert with_table(page, record["cases"]) == page


@needs_compiler
@pytest.mark.parametrize("rank", [4, 40])
def test_a_card_would_time_the_kernels_that_were_counted(rank):
    """In the record's order, so that each time stands beside its own bound."""
    case = {"dtype": "bfloat16", "rank": rank, "d": 64, "clients": 2, "adapters": 2}
    with executed(90) as device:
        calls = steps(case, torch.device("cpu"))
        del device.launches[:]
        for call in calls:
            call()
    polar = "polar_kernel" if rank == 4 else "polar_blocked_kernel"
    assert [launch.name for launch, _ in device.launches] == ["cross_covariance_kernel", polar, "rotate_average_kernel"]


def test_a_time_below_its_bound_shows():
    record = json.loads(BOUNDS.read_text("utf-8"))
    assert (
        card_of("NVIDIA H200", list(record["cards"])) == "H200" and card_of("NVIDIA A100", list(record["cards"])) == "H100"
    )
    case = record["cases"][0]
    bounds = [kernel["by_card"]["H200"]["bound_us"] for kernel in case["kernels"]]
    rows = beside(case, [2e-6 * bounds[0], 0.5e-6 * bounds[1], 3e-6 * bounds[2]], "H200")
    assert [row["measured_over_bound"] for row in rows] == pytest.approx([2, 0.5, 3])
    assert [line.startswith(kernel) for line, kernel in zip(lines(rows), ("rotate", "cross", "polar"), strict=True)] == [
        True
    ] * 3
    assert [line.endswith("the bound is wrong") for line in lines(rows)] == [False, False, True]
