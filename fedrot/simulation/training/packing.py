"""Frozen linear layers that skip padding.

In a pass of many clients most positions may be padding, whose activations no client learns from. On a CPU, where matrix
products are most of the work, they are therefore computed for the real tokens only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .stacked import StackedModule

FULL = 0.9
"""The part of real positions above which the copies cost more than the padding."""


class _PackedLinear(torch.autograd.Function):
    """A linear layer, x (rows, tokens, d_in) → (rows, tokens, d_out), zero at padding; only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, real: Tensor) -> Tensor:
        ctx.save_for_backward(weight, real)
        return _unpack(functional.linear(x.flatten(0, 1)[real], weight, bias), real, x.shape[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, real = ctx.saved_tensors
        [gradient] = gradients
        return _unpack(gradient.flatten(0, 1)[real] @ weight, real, gradient.shape[:2]), None, None, None


def _unpack(packed: Tensor, real: Tensor, shape: torch.Size) -> Tensor:
    unpacked = packed.new_zeros(shape.numel(), packed.shape[1])
    return unpacked.index_copy_(0, real, packed).view(*shape, packed.shape[1])


class _Packing:
    """The places of the real tokens of the current pass."""

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self.shape = torch.Size()

    def use(self, mask: Tensor | None) -> None:
        """Set the attention mask (rows, tokens) of the inputs that follow, or None."""
        self.real = None
        if mask is not None and mask.dim() == 2 and mask.device.type == "cpu":
            real = mask.flatten().nonzero().squeeze(1)
            if len(real) <= FULL * mask.numel():
                self.real, self.shape = real, mask.shape

    def forward(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """The layer's output, without padding if x has the mask's rows and tokens."""
        if self.real is None or x.dim() != 3 or x.shape[:2] != self.shape:
            return functional.linear(x, linear.weight, linear.bias)
        apply: Callable[..., Tensor] = _PackedLinear.apply
        return apply(x, linear.weight, linear.bias, self.real)


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[Callable[[Tensor | None], None]]:
    """Let the model's frozen linear layers skip padding within the context, which is entered within ``stacked_clients``.

    Yields:
        A function that takes the attention mask of the coming pass (rows, tokens), or None if its inputs have none.
    """
    packing = _Packing()
    under_vmap = {inner for module in model.modules() if type(module) is StackedModule for inner in module.modules()}
    linears = [m for m in model.modules() if type(m) is nn.Linear and m not in under_vmap and not _trained(m)]
    try:
        for linear in linears:
            linear.forward = partial(packing.forward, linear)  # type: ignore[method-assign]
        yield packing.use
    finally:
        for linear in linears:
            del linear.forward
