"""What is counted, on programs of which it is known."""

import pytest
import torch

from . import Launch, Settings, executed, kernels
from .encoding import encode

pytestmark = pytest.mark.slow

STORE = """
.visible .entry store(
)
.reqntid 32
{{
	.reg .b32 	%r<4>;
	mov.u32 	%r1, %tid.x;
	mul.lo.s32 	%r2, %r1, {stride};
	st.shared{vector}.b{bits} 	[%r2], {values};
	ret;
}}
"""


def stored(stride, vector, bits, values):
    """Counts of one warp that stores to shared memory at multiples of a stride in bytes."""
    program = encode(STORE.format(stride=stride, vector=vector, bits=bits, values=values))
    counts = Launch("store", program, (1, 1, 1), b"", (), 32 * stride, 80, ()).execute(Settings(counting=True))
    assert counts.issued == [1] * 4 and counts.lanes == [32] * 4
    return sum(counts.wavefronts), sum(counts.ideal)


@pytest.mark.parametrize(("words", "conflicts"), [(1, 1), (2, 2), (3, 1), (4, 4), (16, 16), (32, 32), (33, 1)])
def test_banks_of_shared_memory(words, conflicts):
    assert stored(4 * words, "", 32, "%r1") == (conflicts, 1)


@pytest.mark.parametrize(("stride", "passes"), [(16, 4), (128, 32), (144, 4)])
def test_wide_accesses_take_turns(stride, passes):
    assert stored(stride, ".v4", 32, "{%r1, %r1, %r1, %r1}") == (passes, 4)


def test_two_numbers_of_one_word_are_one_access():
    assert stored(2, "", 16, "%r1") == (1, 1)


@pytest.mark.parametrize("arch", [80, 90])
def test_sectors_of_global_memory(arch):
    """Every byte once, in sectors of 32; a program of 128 lanes has four warps."""
    with executed(arch, Settings(counting=True)) as device:
        x, y, out = torch.ones(256), torch.ones(256), torch.empty(256)
        kernels.add[(2,)](x, y, out, 256, 128, num_warps=4)
        launch, counts = device.launches[0]
    names = [s.name for s in launch.program.kernel.statements]
    sectors = {
        kind: sum(n for n, name in zip(counts.sectors, names, strict=True) if kind in name) for kind in ("ld.", "st.")
    }
    assert sectors == {"ld.": 2 * 256 * 4 // 32, "st.": 256 * 4 // 32}
    assert counts.sectors_of_launch == counts.sectors_by_cta == 3 * 256 * 4 // 32
    assert dict(zip(names, counts.issued, strict=True))["ret"] == 2 * 4


def test_sectors_that_programs_share():
    with executed(80, Settings(counting=True)) as device:
        x, out = torch.ones(512), torch.empty(512)
        kernels.add[(4,)](x, x, out, 512, 128, num_warps=1)
        _, counts = device.launches[0]
        assert sum(counts.sectors) == 3 * 512 * 4 // 32  # both loads ask for the same
        assert counts.sectors_of_launch == counts.sectors_by_cta == 2 * 512 * 4 // 32
        kernels.statistics[(1,)](x, torch.empty(1, 4), 512, num_warps=4)
        kernels.product[(1,)](
            torch.ones(16, 32), torch.ones(32, 16), torch.empty(16, 16), 16, 16, 32, 32, False, False, "ieee", num_warps=1
        )
        for _, counts in device.launches[1:]:
            assert sum(counts.wavefronts) >= sum(counts.ideal) > 0
