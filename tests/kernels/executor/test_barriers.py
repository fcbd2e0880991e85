"""Barriers of the package's kernels, left out one by one, are missed: the executor sees the race that each prevents.

A few are not, because another barrier stands close enough, such as one of Triton's own beside ``tl.debug_barrier()``. Then
nothing may change: the results are the same bits in both orders of the warps.
"""

from dataclasses import replace

import pytest
import torch

import fedrot_kernels as fk

from ..test_whole_model import model
from . import Fault, Settings, executed

pytestmark = pytest.mark.slow
# Per rank the kernels with several warps, and of how many barriers that were executed one is left out: a matrix of rank 64
# takes a third of a second.
KERNELS = {
    16: {"cross_covariance_kernel": 1, "rotate_average_kernel": 1, "plain_average_kernel": 1},
    32: {"polar_kernel": 1},
    64: {"polar_blocked_kernel": 12},
}
SPARE = {"cross_covariance_kernel": 1, "rotate_average_kernel": 2, "plain_average_kernel": 0, "polar_kernel": 1}


def missed(launch, at):
    """The fault if a barrier is left out, or None; and the outputs in both orders."""
    without = replace(launch, program=launch.program.without(at))
    found = []
    for reverse in (False, True):
        try:
            without.execute(Settings(reverse=reverse))
        except Fault as fault:
            return fault.kind, []
        found.append(bits(launch))
    return None, found


def bits(launch):
    return [x.view(torch.uint8).clone() for x in launch.tensors]


@pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("rank", "dtype"), [(16, torch.float32), (16, torch.bfloat16), (32, torch.float32), (64, torch.float32)]
)
def test_every_barrier_is_missed_or_changes_nothing(rank, dtype, arch):
    A, B, A_ref, _ = model([(rank, 72, 136)], 2, dtype)
    with executed(arch) as device:
        fk.align_average(A, B, [1.0, 2.0], A_ref=A_ref, strength=0.5, backend="triton")
        fk.average(A, [1.0, 2.0], backend="triton")
        launches = {launch.name: (launch, counts) for launch, counts in device.launches}
        for name, step in KERNELS[rank].items():
            launch, counts = launches[name]
            assert launch.program.kernel.warps > 1
            names = [s.name for s in launch.program.kernel.statements]
            barriers = [at for at, n in enumerate(counts.issued) if n and names[at] == "bar.sync"][::step]
            expected = bits(launch)
            results = [missed(launch, at) for at in barriers]
            kinds = [kind for kind, _ in results]
            assert set(kinds) <= {"race", "uninitialised", None}
            assert len(barriers) >= 2 and kinds.count(None) <= SPARE.get(name, len(barriers) // 4), name
            for found in (outputs for _, pair in results for outputs in pair):
                assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
