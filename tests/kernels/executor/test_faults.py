"""Faults that were put into kernels, or into the PTX that Triton made of them, are found and say where they are."""

import re
from dataclasses import replace

import pytest
import torch

from . import Fault, NotModelled, Settings, executed, kernels
from .encoding import encode
from .memory import POISON

pytestmark = pytest.mark.slow


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def device(request):
    with executed(request.param) as driver:
        yield driver


@pytest.fixture
def hopper():
    with executed(90) as driver:
        yield driver


def refuses(kind, launch, *arguments, **options):
    with pytest.raises(Fault) as found:
        launch(*arguments, **options)
    assert found.value.kind == kind, found.value
    return str(found.value)


def edited(launch, pattern, replacement, count=0):
    """The launch with its PTX changed."""
    text, n = re.subn(pattern, replacement, launch.program.kernel.text, count=count)
    assert n, pattern
    return replace(launch, program=encode(text))


def product(device, dtype=torch.float16, warps=4, precision="ieee", size=64):
    """A launched product of matrices (64, size) and (size, 64)."""
    x, y, out = torch.ones(64, size, dtype=dtype), torch.ones(size, 64, dtype=dtype), torch.empty(64, 64)
    options = {"num_warps": warps, "num_stages": 1}
    kernels.product[(1,)](x, y, out, 64, 64, size, 32, False, False, precision, **options)
    launch, _ = device.launches[-1]
    launch.execute()
    return launch


@pytest.mark.parametrize("short", [0, 1, 2])
def test_accesses_beyond_a_tensor(device, short):
    """Also where other tensors, and memory of the process, lie right behind."""
    memory = [torch.zeros(1000) for _ in range(3)]
    x, y, out = (m[: 256 - (i == short)] for i, m in enumerate(memory))
    device.outputs = {"add_without_mask": ("p_out",)}
    message = refuses("out of bounds", kernels.add_without_mask[(2,)], x, y, out, 128)
    assert "CTA 1, warp 3, lane 3" in message and "kernels.py:" in message


def test_accesses_before_a_tensor(device):
    x, out = torch.zeros(64), torch.empty(16)
    refuses("out of bounds", kernels.promise_too_much[(1,)], x[32:], out, -8, 16)


def test_stores_to_inputs(device):
    device.outputs = {"add_to_input": ()}
    x = torch.zeros(128)
    refuses("store to an input", kernels.add_to_input[(1,)], x, torch.ones(128), 128)
    assert not x.any()
    device.outputs = {"add_to_input": ("p_x",)}
    kernels.add_to_input[(1,)](x, torch.ones(128), 128)
    assert (x == 1).all()


def test_promises_of_alignment_that_do_not_hold(device):
    x, out = torch.arange(256.0), torch.empty(128)
    kernels.promise_too_much[(1,)](x, out, 4, 128, num_warps=1)
    assert torch.equal(out, x[4:132])
    refuses("misaligned", kernels.promise_too_much[(1,)], x, out, 5, 128, num_warps=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_of_global_memory_that_nothing_wrote(device, dtype):
    x, out = torch.empty(256, dtype=dtype), torch.empty(256, dtype=dtype)
    x[:200] = 1
    refuses("uninitialised", kernels.add[(1,)], x, torch.ones(256, dtype=dtype), out, 256, 256)
    kernels.add[(1,)](x, torch.ones(256, dtype=dtype), out, 200, 256)
    assert (out[:200] == 2).all() and (out[200:].view(torch.int16) == POISON).all()


def test_poison_that_is_half_a_number_is_none(device):
    x, out = torch.full((256,), POISON, dtype=torch.int32).view(torch.float32), torch.empty(256)
    kernels.add[(1,)](x, torch.zeros(256), out, 256, 256)
    assert torch.equal(out, x)


def test_programs_that_write_the_same_place(device):
    refuses("race between programs", kernels.add_all_to_one_place[(2,)], torch.ones(256), torch.empty(1), 128)


def test_programs_of_which_one_reads_what_another_writes(device):
    x = torch.ones(512)
    device.outputs = {"add": ("p_out",)}
    for reverse in (False, True):
        device.settings = Settings(reverse=reverse)
        refuses("race between programs", kernels.add[(2,)], x[:256], torch.ones(256), x[128:384], 256, 128)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_barrier_between_warps_that_meet_in_global_memory(device, reverse):
    x = torch.arange(256.0)
    kernels.through_scratch[(1,)](x, torch.empty(256), torch.empty(256), 256, num_warps=4)
    launch, _ = device.launches[-1]
    refuses("race", edited(launch, r"bar\.sync\s+0;", "").execute, Settings(reverse=reverse))


def test_a_warp_barrier_between_lanes_that_meet_in_shared_memory(device):
    """In a program of one warp it is lanes that must wait for each other."""
    launch = product(device, torch.float32, warps=1, size=32)
    refuses("race", edited(launch, r"bar\.(warp\.)?sync\s+(0|-1);", "").execute)


def test_reads_of_shared_memory_that_nothing_wrote(device):
    launch = product(device)
    refuses("uninitialised", edited(launch, r"st\.shared\.v4\.b32 \[.*?\}|stmatrix.*?\}", "nothing", 1).execute)


def test_accesses_beyond_shared_memory(device):
    launch = product(device)
    refuses("out of bounds", replace(launch, shared_bytes=launch.shared_bytes - 16).execute)


@pytest.mark.parametrize("instruction", ["bar.sync", "ldmatrix", "mma.sync", "wgmma.fence"])
def test_whole_warps_are_needed(device, instruction):
    launch = product(device)
    if instruction not in launch.program.kernel.text:
        pytest.skip("not in the program for this architecture")
    lane = "mov.u32 %r99999, %tid.x;\nsetp.ne.b32 %p99999, %r99999, 5;\n@%p99999 "
    refuses("divergence", edited(launch, re.escape(instruction), lane + instruction, 1).execute)


def test_warps_that_leave_while_others_wait(device):
    launch = product(device)
    leave = "mov.u32 %r99999, %tid.x;\nsetp.lt.s32 %p99999, %r99999, 32;\n@%p99999 ret;\nbar.sync 0;"
    refuses("deadlock", edited(launch, r"bar\.sync\s+0;", leave, 1).execute)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_missing_proxy_fence(hopper, dtype):
    launch = product(hopper, dtype, precision="tf32")
    assert "missing fence" in refuses("missing fence", edited(launch, r"fence\.proxy\.async.*?;", "").execute)


def test_a_missing_fence_of_registers(hopper):
    refuses("missing fence", edited(product(hopper), r"wgmma\.fence\.sync\.aligned;", "").execute)


def test_results_that_were_not_waited_for(hopper):
    refuses("pending wgmma", edited(product(hopper), r"wgmma\.wait_group\.sync\.aligned 0;", "").execute)
    refuses("pending wgmma", edited(product(hopper), r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;").execute)
    refuses("pending wgmma", edited(product(hopper), r"wgmma\.commit_group\.sync\.aligned;", "").execute)


def test_shared_memory_that_is_overwritten_before_a_wait(hopper):
    """The wait comes last, after the next block has been stored."""
    launch = product(hopper)
    store = "mov.u32 %r99998, 0;\nst.shared.b32 [%r99998], %r99998;\nbar.sync 0;\n"
    late = edited(launch, r"(wgmma\.wait_group\.sync\.aligned 0;)", store + r"\1")
    assert "may still read" in refuses("pending wgmma", late.execute)


@pytest.mark.parametrize("instruction", ["atom.global.add.f32 %r1, [%rd1], %r2;", "{ call x; }", "bar.sync 0; bar.sync 0;"])
def test_what_is_not_modelled_says_its_line(device, instruction):
    launch = product(device)
    with pytest.raises(NotModelled, match=r"line \d+: " + re.escape(instruction.rstrip(";"))):
        edited(launch, r"bar\.sync\s+0;", instruction, 1)
