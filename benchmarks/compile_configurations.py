"""Every configuration that the launchers in ``fedrot_kernels/triton_backend`` can choose, for every architecture."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget

from fedrot_kernels.triton_backend import cross_covariance, plain_average, rotate_average, rotations
from fedrot_kernels.triton_backend.launch import DTYPES, RANKS, LaunchOptions


@dataclass(frozen=True)
class Architecture:
    """What a kernel is compiled for.

    Attributes:
        target: Triton's name of it.
        shared: bytes of shared memory that one program may have.
    """

    target: GPUTarget
    shared: int


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is compiled for one architecture.

    Attributes:
        kernel: cross_covariance, polar, polar_blocked, rotate_average or plain_average.
        case: rank and dtypes, as in "RP 16, bfloat16, float32".
        aligned: whether inputs are aligned; None if the kernel makes no difference.
        architecture: a key of ``ARCHITECTURES``.
        options: what the launcher passes.
    """

    kernel: str
    case: str
    aligned: bool | None
    architecture: str
    options: LaunchOptions

    @property
    def title(self) -> str:
        """The case with its alignment."""
        return self.case + {None: "", True: ", aligned", False: ", unaligned"}[self.aligned]


def configurations() -> list[Configuration]:
    """Kernel by kernel, in the order in which the kernels run."""
    return [
        Configuration(kernel, case, aligned, architecture, options)
        for architecture, properties in ARCHITECTURES.items()
        for kernel, case, aligned, options in _launches(properties.target.backend)
    ]


def _launches(backend: str) -> Iterator[tuple[str, str, bool | None, LaunchOptions]]:
    # A reference is of its clients' dtype or float32. A float32 one where both factors are aligned also takes a launch
    # as a client itself: (float32, float32) again. Averages are in the clients' dtype, or in float32 for single tensors.
    pairs = [(dtype, other) for dtype in DTYPES for other in dict.fromkeys((dtype, torch.float32))]
    for RP in RANKS:
        for dtype, ref in pairs:
            for aligned in (True, False):
                options = cross_covariance.options(RP, dtype, ref, aligned, backend)
                yield "cross_covariance", f"RP {RP}, {_name(dtype)}, reference {_name(ref)}", aligned, options
    for RP in RANKS:
        yield "polar" if RP <= 32 else "polar_blocked", f"RP {RP}", None, rotations.options(RP, backend)
    for RP in RANKS:
        for dtype, out in pairs:
            for aligned in (True, False):
                options = rotate_average.options(RP, dtype, out, aligned, backend)
                yield "rotate_average", f"RP {RP}, {_name(dtype)}, average {_name(out)}", aligned, options
    for dtype in DTYPES:
        for aligned in (True, False):
            yield "plain_average", _name(dtype), aligned, plain_average.options(dtype, aligned)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
