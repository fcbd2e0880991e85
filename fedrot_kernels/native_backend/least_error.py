"""The least aggregation error of the clients' averages, adapter by adapter."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import normalize_weights
from ..stopping import (
    ERROR_ROUNDING_SQUARED,
    FIRST_STEP,
    FIRST_SWEEPS,
    LEAST_ERROR,
    LEAST_ERROR_STEPS,
    LONGER_STEP,
    OTHERS,
    SHORTER_STEP,
    UNBOUNDED_STEP,
)
from ..tolerances import CURVATURE_RIDGE
from ..types import Aligned, Clients
from .library import Descent
from .whole_model import align_average

MOST_ROWS = 2896  # of a Gram matrix, whose two then take 128 MB


def least_error_average(
    A: Sequence[Clients],
    B: Sequence[Clients],
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor],
    B_ref: Sequence[Tensor],
    reflections: bool,
    strength: float,
    instructions: str | None = None,
) -> tuple[Aligned, Tensor, list[int]]:
    """Rotate clients so that their average loses least, and average them, checked factors on a CPU; see ``align_together``.

    Args:
        A, B, weights, A_ref, B_ref, reflections, strength: as there; λ above 0.
        instructions: as in ``whole_model.align_average``.

    Returns:
        The averages, without numbers of undetermined directions; the error, the norm of the mean update and the plain error
        of every adapter, (L, 3) float64; and the adapters whose rotations Newton–Schulz does not find in float64, or whose
        factors are not finite or beyond the range of float32's squares, and which hold no results.

    An adapter takes two Gram matrices of (N + 2) r rows in float64, at most ``MOST_ROWS``.
    """
    errors = torch.zeros(len(A), 3, dtype=torch.float64, device="cpu")
    unsure = torch.zeros(len(A), dtype=torch.uint8, device="cpu")
    shares = normalize_weights(weights, len(A[0]), torch.device("cpu"))
    steps = OTHERS, FIRST_STEP, SHORTER_STEP, LONGER_STEP, UNBOUNDED_STEP, ERROR_ROUNDING_SQUARED, LEAST_ERROR
    descent = Descent(*steps, CURVATURE_RIDGE, strength, shares.data_ptr(), FIRST_SWEEPS, LEAST_ERROR_STEPS)
    found = align_average(
        A,
        B,
        weights,
        A_ref=A_ref,
        B_ref=B_ref,
        strength=1.0,
        reflections=reflections,
        fields={"descent": ctypes.addressof(descent), "errors": errors, "unsure": unsure},
        instructions=instructions,
    )
    return found, errors, unsure.nonzero().squeeze(-1).tolist()
