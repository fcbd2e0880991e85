"""Generalised Procrustes: rotations that bring clients to each other, not to one of them (Gower, 1975; Ten Berge, 1977)."""

import torch
from torch import Tensor

from ..stopping import CONSENSUS, CONSENSUS_SWEEPS, OTHERS, SLOWEST
from ..torch_backend.procrustes import rotations
from .gram import Grams, Mean


def consensus(
    grams: Grams,
    R: Tensor,
    *,
    reflections: bool,
    floor: float | Tensor,
    on: str = "AB",
    sweeps: int = CONSENSUS_SWEEPS,
) -> Tensor:
    """Lower Σ wᵢ‖RᵢᵀFᵢ − F̄‖² over rotations R, with F̄ = Σ wⱼRⱼᵀFⱼ and F = [A | Bᵀ], both factors scaled to one size.

    A sweep turns one client after the other towards the mean of the others, Rᵢ ← polar(Fᵢ(F̄ − wᵢRᵢᵀFᵢ)ᵀ), and F̄ follows
    at once. No turn raises the sum. A mean that contained the client too would hold it where it is: on hard data that took
    up to ten times as many sweeps.

    An adapter is left when the sweeps to come are estimated to lower its sum by less than ``CONSENSUS`` of it. What it
    becomes does not depend on what else is in the batch.

    Args:
        grams: Gram matrices of the clients' factors.
        R: (G, n, r, r), where to begin.
        reflections: False for SO(r), True for O(r).
        floor: as in ``rotations``, also one per adapter, (G,).
        on: the factors that count, "A", "B" or "AB".
        sweeps: the most sweeps.

    Returns:
        R (G, n, r, r).
    """
    R, n, r = R.clone(), *R.shape[1:3]
    floors = torch.as_tensor(floor, dtype=R.dtype, device=R.device).expand(len(R))
    factors = [getattr(grams, factor) for factor in on]
    means, S = [Mean(factor, grams.w * R) for factor in factors], torch.stack([x.blocks() for x in factors]).sum(0)
    total = torch.stack([x.squares @ grams.w.flatten() for x in factors]).sum(0)
    rounding = (r * torch.finfo(R.dtype).eps) ** 2 * total
    last, going = torch.full_like(total, torch.inf), torch.ones_like(total, dtype=torch.bool)
    for _ in range(sweeps):
        moved = torch.zeros_like(total)
        for i in range(n):
            w = grams.w[i]
            M = torch.stack([mean.products(i) for mean in means]).sum(0) - OTHERS * w * (S[:, i] @ R[:, i])
            D = rotations(M, reflections=reflections, floor=floors).R - R[:, i]
            D = torch.where(going[:, None, None], D, 0)
            R[:, i] += D
            for mean in means:
                mean.add(i, w * D)
            moved += w.squeeze() * (D * (S[:, i] @ D)).sum((1, 2))
        spread = total - torch.stack([mean.square() for mean in means]).sum(0)
        going &= (moved > rounding) & (_to_come(moved, last) > CONSENSUS * spread)
        last = moved
        if not bool(going.any()):
            break
    return R


def _to_come(moved: Tensor, last: Tensor) -> Tensor:
    """What later sweeps move, if each moves less than the one before by the factor of these two; unknown after the first."""
    rate = (moved / last).clamp(max=SLOWEST)
    return torch.where(last.isinf(), torch.inf, moved * rate / (1 - rate))
