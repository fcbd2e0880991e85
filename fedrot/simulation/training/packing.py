"""Frozen linear layers that skip padding.

In a pass of many clients most positions may be padding. Nothing that is learnt depends on what stands there, so on a CPU,
where products of matrices are most of the work, they are taken over the real tokens only.
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
"""Where so many positions are real, the copies cost more than the padding."""


class _PackedLinear(torch.autograd.Function):
    """x (rows, tokens, d_in) -> (rows, tokens, d_out), zero where no real token is; of x alone a gradient."""

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
    return unpacked.index_copy_(0, real, packed).unflatten(0, shape)


class _Packing:
    """The places of the real tokens of the current pass."""

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self.shape = torch.Size()

    def use(self, mask: Tensor | None) -> None:
        """From here on inputs have this attention mask (rows, tokens)."""
        self.real = None
        if mask is not None and mask.dim() == 2 and mask.device.type == "cpu":
            real = mask.flatten().nonzero().squeeze(1)
            if len(real) <= FULL * mask.numel():
                self.real, self.shape = real, mask.shape

    def forward(self, linear: nn.Linear, x: Tensor) -> Tensor:
        if self.real is None or x.dim() != 3 or x.shape[:2] != self.shape:
            return functional.linear(x, linear.weight, linear.bias)
        return _PackedLinear.apply(x, linear.weight, linear.bias, self.real)


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[Callable[[Tensor | None], None]]:
    """Within the context the model's frozen linear layers skip padding. To be entered within ``stacked_clients``.

    Yields:
        What tells them a pass's attention mask (rows, tokens), None for inputs that have none.
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
