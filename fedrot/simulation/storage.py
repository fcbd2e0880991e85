"""Weights that are stored in float16, emulated: float32 tensors whose values are those of float16."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# The dtype of the tensors that hold the base model's weights, by the configuration's dtype.
TENSOR_DTYPES: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32}


@torch.no_grad()
def round_to_float16(tensors: Iterable[Tensor]) -> None:
    """Round floating-point tensors in place to the nearest values of float16; those beyond its range become infinite."""
    for x in tensors:
        if x.is_floating_point():
            x.copy_(x.half())
