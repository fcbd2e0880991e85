"""Consensus and least error by the compiled library, and by PyTorch for the adapters that the library leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..measures import rotation_angle
from ..native_backend.consensus import consensus_average
from ..native_backend.least_error import least_error_average
from ..sketch import estimate_errors
from ..types import Aligned, Clients, Estimates, Together


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
    finite, estimates = found.finite, found.estimates
    if left:
        of_A, of_B, refs_A, refs_B = ([x[i] for i in left] for x in (A, B, A_ref, B_ref))
        rest = careful(of_A, of_B, weights, A_ref=refs_A, B_ref=refs_B)
        finite = _take(found, rest, left)
        if estimates is not None and sketch_seed is not None:
            of_rest = estimate_errors(of_A, of_B, rest.R, weights, rest.A, rest.B, sketch_seed)
            estimates.numbers[left] = of_rest.numbers
            estimates = Estimates(estimates.numbers, estimates.squares + of_rest.squares)
    strengths = torch.full((len(A),), strength, dtype=torch.float64, device="cpu")
    return Together(
        found.A, found.B, found.R, found.residual, finite, strengths, None, None, None, None, estimates, found.angles
    )


@torch.no_grad()
def native_least_error(
    A: Sequence[Clients],
    B: Sequence[Clients],
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor],
    B_ref: Sequence[Tensor],
    strength: float,
    careful: Callable[..., Together],
    **options: Any,
) -> Together:
    """Rotate clients so that their average loses least; see ``align_together``.

    Args:
        A, B, weights, A_ref, B_ref, strength: as there, checked.
        careful: as in ``native_consensus``.
        options: ``reflections``.
    """
    found, errors, left = least_error_average(A, B, weights, A_ref=A_ref, B_ref=B_ref, strength=strength, **options)
    finite = found.finite
    if left:
        of_A, of_B, refs_A, refs_B = ([x[i] for i in left] for x in (A, B, A_ref, B_ref))
        rest = careful(of_A, of_B, weights, A_ref=refs_A, B_ref=refs_B)
        finite = _take(found, rest, left)
        errors[left] = torch.stack([x for x in (rest.error, rest.update_norm, rest.plain_error) if x is not None], dim=1)
    strengths = torch.full((len(A),), strength, dtype=torch.float64, device="cpu")
    error, norm, plain = errors.unbind(1)
    return Together(
        found.A, found.B, found.R, found.residual, finite, strengths, error, norm, plain, None, None, found.angles
    )


def _take(found: Aligned, rest: Together, left: list[int]) -> Tensor:
    """Take the results of adapters that the library left; whether all averages are finite."""
    for k, i in enumerate(left):
        found.A[i], found.B[i], found.R[i] = rest.A[k], rest.B[k], rest.R[k]
    found.residual[left] = rest.residual
    if found.angles is not None:
        found.angles[left] = torch.stack([rotation_angle(x) for x in rest.R]).double()
    return found.finite & rest.finite
