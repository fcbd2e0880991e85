"""The consensus by the compiled library, and by PyTorch for the adapters that the library leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..native_backend.consensus import consensus_average
from ..sketch import estimate_errors
from ..types import Clients, Estimates, Together


@torch.no_grad()
def native_consensus(
    A: Sequence[Clients],
    B: Sequence[Clients],
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor],
    B_ref: Sequence[Tensor],
    strength: float,
    sketch_seed: int | None,
    careful: Callable[..., Together],
    **options: Any,
) -> Together:
    """Rotate clients to their consensus and average them; see ``align_together``.

    Args:
        A, B, weights, A_ref, B_ref, strength, sketch_seed: as there, checked.
        careful: aligns the adapters that the library leaves, given factors, weights and references.
        options: ``on`` and ``reflections``.
    """
    found, left = consensus_average(
        A, B, weights, A_ref=A_ref, B_ref=B_ref, strength=strength, sketch_seed=sketch_seed, **options
    )
    mean_A, mean_B, R, residual, finite, estimates = found.A, found.B, found.R, found.residual, found.finite, found.estimates
    if left:
        of_A, of_B, refs_A, refs_B = ([x[i] for i in left] for x in (A, B, A_ref, B_ref))
        rest = careful(of_A, of_B, weights, A_ref=refs_A, B_ref=refs_B)
        for k, i in enumerate(left):
            mean_A[i], mean_B[i], R[i] = rest.A[k], rest.B[k], rest.R[k]
        residual[left], finite = rest.residual, finite & rest.finite
        if estimates is not None and sketch_seed is not None:
            of_rest = estimate_errors(of_A, of_B, rest.R, weights, rest.A, rest.B, sketch_seed)
            estimates.numbers[left] = of_rest.numbers
            estimates = Estimates(estimates.numbers, estimates.squares + of_rest.squares)
    strengths = torch.full((len(A),), strength, dtype=torch.float64, device="cpu")
    return Together(mean_A, mean_B, R, residual, finite, strengths, None, None, None, None, estimates)
