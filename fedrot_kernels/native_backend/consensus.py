"""Consensus of the clients, adapter by adapter while their factors are in the cache."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..stopping import CONSENSUS, CONSENSUS_SWEEPS, OTHERS, SLOWEST
from ..types import Aligned, Clients
from .library import Sweeps
from .whole_model import align_average

_ON = {"A": 1, "B": 2, "AB": 3}


def consensus_average(
    A: Sequence[Clients],
    B: Sequence[Clients],
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor],
    B_ref: Sequence[Tensor],
    on: str,
    reflections: bool,
    strength: float,
    sketch_seed: int | None = None,
    instructions: str | None = None,
) -> tuple[Aligned, list[int]]:
    """Rotate clients to their consensus and average them, checked factors on a CPU; see ``align_together``.

    Args:
        A, B, weights, A_ref, B_ref, on, reflections, strength, sketch_seed: as there; λ above 0.
        instructions: as in ``whole_model.align_average``.

    Returns:
        The averages, without numbers of undetermined directions; and the adapters whose rotations float32 does not find, or
        whose factors are not finite, and which hold no results.
    """
    unsure = torch.zeros(len(A), dtype=torch.uint8, device="cpu")
    sweeps = Sweeps(OTHERS, CONSENSUS, SLOWEST, CONSENSUS_SWEEPS, _ON[on], unsure.data_ptr())
    found = align_average(
        A,
        B,
        weights,
        A_ref=A_ref,
        B_ref=B_ref,
        strength=strength,
        reflections=reflections,
        sketch_seed=sketch_seed,
        fields={"sweeps": ctypes.addressof(sweeps)},
        instructions=instructions,
    )
    return found, unsure.nonzero().squeeze(-1).tolist()
