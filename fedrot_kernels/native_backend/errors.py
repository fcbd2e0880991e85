"""Aggregation errors of a whole model in one call, adapter by adapter, without a copy of the inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import count_clients, normalize_weights
from ..types import Clients
from .call import Call


def measure_errors(
    A: Sequence[Clients],
    B: Sequence[Clients],
    R: Sequence[Tensor] | None,
    weights: Sequence[float] | Tensor,
    instructions: str | None = None,
) -> tuple[Tensor, list[int]]:
    """Measure the errors of checked factors on a CPU; see ``measures.measure_errors``.

    Args:
        A, B, R, weights: as there.
        instructions: as in ``whole_model.align_average``.

    Returns:
        The errors (L, 3); and the adapters whose factors or rotations the library does not take, whose errors are zeros:
        rotations that are not orthogonal, and squares of factors beyond the range of float32.
    """
    call = Call(A, B, instructions)
    errors = torch.zeros(len(A), 3, dtype=torch.float64, device="cpu")
    unsure = torch.zeros(len(A), dtype=torch.uint8, device="cpu")
    shares = normalize_weights(weights, count_clients(A), torch.device("cpu")).float()
    call.set(shares=shares, errors=errors, unsure=unsure)
    if R is not None:
        call.set(R=[x.detach().to(torch.float32).contiguous() for x in R])
    call.run()
    return errors, unsure.nonzero().squeeze(-1).tolist()
