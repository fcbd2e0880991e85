"""Parts that all launchers share: padded ranks, dtypes, and launch options as data, which the compile matrix enumerates."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tolerances import LARGEST_TRITON_RANK

RANKS = (4, 8, 16, 32, 64, LARGEST_TRITON_RANK)  # padded ranks, in registers and scratch; factors are never padded
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
ALIGNMENT = 16  # bytes of the widest load


@dataclass(frozen=True)
class LaunchOptions:
    """A kernel's compile-time constants, warps per program and pipeline stages."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


def padded_rank(rank: int) -> int:
    """The smallest of RANKS that holds a rank."""
    return next(RP for RP in RANKS if RP >= rank)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype."""
    return DTYPES[dtype]


def rank_multiple(RP: int, dtype: torch.dtype) -> int:
    """The divisor of all ranks that lets rows of B be read in the widest loads that fit them."""
    return min(RP, ALIGNMENT // dtype.itemsize)


def precision(backend: str) -> str:
    """The input precision of float32 products: never Triton's default, tf32, which keeps three digits.

    Args:
        backend: "cuda", or "hip", which has float32 matrix instructions and no tf32x3.
    """
    return "tf32x3" if backend == "cuda" else "ieee"


def current_backend() -> str:
    """ "hip" where PyTorch was built for AMD, "cuda" elsewhere."""
    return "hip" if torch.version.hip else "cuda"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), which takes tensors on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's GPU the current one, to which Triton launches; nothing for a tensor on the CPU."""
    return torch.cuda.device_of(x)
