"""FedMomentum (arXiv 2603.08014): the best adapter of rank r, and what the mean update has beyond it goes into the base."""

import torch
from torch import Tensor

from .low_rank import Combined, LowRankMethod
from .mean_update import count_energy, mean_svd, shared_evenly

ENERGY = 0.9999  # τ, the paper's


class FedMomentum(LowRankMethod):
    """B̄ = U_r√Σ_r and Ā = √Σ_rV_rᵀ of ΔW̄ = UΣVᵀ; components r+1 … r+k, up to the energy τ, are added to the base weights.

    τ, ``energy``, is the part of the squared singular values that adapter and base hold together. Where the factors are
    rounded to half precision, what that loses goes into the base too, as in FedEx-LoRA. With DoRA, whose magnitudes are
    averaged, the direction is that of the mean.
    """

    name = "fedmomentum"
    paper = "arXiv 2603.08014"
    down = "A, B and the residual"
    cost = "N² r² d + N³ r³"
    exact = "up to τ, through the base weights"
    uses = frozenset({"energy"})
    unequal_ranks = "stack"
    supports_server_optimizer = False
    updates_base = True

    def combine(self, A: Tensor, B: Tensor, w: Tensor, dtype: torch.dtype) -> Combined:
        """See ``LowRankMethod.combine``."""
        r, svd = A.shape[2], mean_svd(A, B, w)
        if svd is None:
            nan = torch.full_like(A[:, 0], torch.nan), torch.full_like(B[:, 0], torch.nan)
            return Combined(*nan, nan)
        needed = count_energy(svd.sigma, self.options.energy or ENERGY, A.shape[1] * r)
        beyond = [max(k - r, 1) for k in needed]  # at least one, of zero where the adapter holds all: PEFT has no rank 0
        A_mean, B_mean = shared_evenly(svd, slice(r), r)
        A_base, B_base = shared_evenly(svd, slice(r, r + max(beyond)), max(beyond))
        empty = torch.tensor([k <= r for k in needed], device=A.device)[:, None, None]
        A_base, B_base = A_base.masked_fill(empty, 0), B_base.masked_fill(empty, 0)
        if dtype != A.dtype:
            A_lost, B_lost = rounding_residual(A_mean, B_mean, dtype)
            A_base, B_base = torch.cat([A_lost, A_base], 1), torch.cat([B_lost, B_base], 2)
            beyond = [A_lost.shape[1] + k for k in beyond]
        return Combined(A_mean.to(dtype).to(A.dtype), B_mean.to(dtype).to(B.dtype), (A_base, B_base), base_ranks=beyond)


def rounding_residual(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of what B·A loses where A and B are rounded to Ã and B̃: (B−B̃)Ã + B(A−Ã), of rank 2 r.

    Args:
        A, B: (G, r, d_in) and (G, d_out, r).
        dtype: that both are rounded to.

    Returns:
        (G, 2 r, d_in) and (G, d_out, 2 r), of the dtype of A and B.
    """
    A_sent, B_sent = A.to(dtype).to(A.dtype), B.to(dtype).to(B.dtype)
    return torch.cat([A_sent, A - A_sent], dim=1), torch.cat([B - B_sent, B], dim=2)
