"""Generalised Procrustes: rotations that bring clients to each other, not to one of them (Gower, 1975)."""

import torch
from torch import Tensor

from ..torch_backend.procrustes import rotations
from .gram import Grams

STEPS = 10


def consensus(
    grams: Grams, R: Tensor, *, reflections: bool, floor: float | Tensor, on: str = "AB", steps: int = STEPS
) -> Tensor:
    """Lower Σ wᵢ‖RᵢᵀFᵢ − F̄‖² over rotations R, with F̄ = Σ wⱼRⱼᵀFⱼ and F = [A | Bᵀ], both factors scaled to one size.

    A step keeps F̄ as it is, sets Rᵢ ← polar(FᵢF̄ᵀ), and updates F̄. No step raises the sum.

    Args:
        grams: Gram matrices of the clients' factors.
        R: (G, n, r, r), where to begin.
        reflections: False for SO(r), True for O(r).
        floor: as in ``rotations``, also one per adapter, (G,).
        on: the factors that count, "A", "B" or "AB".
        steps: how many steps. On adapters of real clients ten come within 1e-3 of what a hundred reach, relative to the
            update.

    Returns:
        R (G, n, r, r).
    """
    for _ in range(steps):
        W = grams.w * R
        M = torch.stack([getattr(grams, factor)(W) for factor in on]).sum(0)  # FᵢF̄ᵀ
        floors = floor[:, None].expand(M.shape[:-2]) if isinstance(floor, Tensor) else floor
        R = rotations(M, reflections=reflections, floor=floors).R
    return R
