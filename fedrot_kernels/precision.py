"""Working precision: float32 or float64 throughout, whatever the caller's training loop has switched on."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function without autograd, autocast and tf32.

    Autocast would round rotations to half precision, and tf32 would keep three digits of them.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if (given := torch.get_float32_matmul_precision()) != "highest":
            torch.set_float32_matmul_precision("highest")
            try:
                return wrapper(*args, **kwargs)
            finally:
                torch.set_float32_matmul_precision(given)
        if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            with torch.no_grad():  # leaving autocast takes longer than the smallest of these functions
                return function(*args, **kwargs)
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return wrapper


def working_dtype(*inputs: Tensor | torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 if one of the inputs is, else float32.

    Args:
        inputs: tensors or dtypes.

    Raises:
        TypeError: an input is not floating-point.
    """
    dtypes = [x.dtype if isinstance(x, Tensor) else x for x in inputs]
    for dtype in dtypes:
        if not dtype.is_floating_point:
            raise TypeError(f"expected a floating-point tensor, got {dtype}")
    return torch.float64 if torch.float64 in dtypes else torch.float32


def widen(x: Tensor) -> Tensor:
    """The tensor in its working dtype, without its autograd history; no copy where neither has to change."""
    return x.detach().to(working_dtype(x))
