"""Computing as written, whatever the caller's training loop has switched on."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def full_precision(function: Function) -> Function:
    """Run a function without autograd, outside autocast, in which a rotation would be rounded to half precision, and
    without tf32, in which it would keep three digits."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
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

    return wrapper  # type: ignore[return-value]
