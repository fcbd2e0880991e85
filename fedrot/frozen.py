"""Factors that a method does not train in a round: the same in every update, and in the result."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .errors import UpdateError
from .keys import TensorSpec
from .updates import StateDict, Update


def as_sent(x: Tensor, spec: TensorSpec) -> Tensor:
    """A copy of a factor that was not trained, as the clients' updates have it."""
    return x.detach().to(spec.dtype, copy=True).reshape(spec.shape)


def check_frozen(client: Update, expected: StateDict, frozen: Iterable[str], method: str) -> None:
    """Raise UpdateError if a factor that clients do not train is not what it was."""
    for key in frozen:
        x, y = client[key].detach(), expected[key].detach()
        if not torch.equal(x, y.to(x.device, x.dtype).reshape(x.shape)):
            raise UpdateError(
                f"{client.name}, {key} {tuple(x.shape)}: frozen in this round of {method}, but not what clients started "
                "from; begin from one adapter and do not train it, or pass the right round"
            )
