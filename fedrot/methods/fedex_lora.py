"""FedEx-LoRA (arXiv 2410.09432): averages the factors and adds what that loses to the base weights."""

import torch
from torch import Tensor

from .low_rank import Combined, LowRankMethod, stacked


class FedExLoRA(LowRankMethod):
    """The residual Σ wᵢBᵢAᵢ − B̄Ā = Σ wᵢ(Bᵢ−B̄)(Aᵢ−Ā) is added to the base, as factors of rank N r.

    Where the means B̃ and Ã are rounded to half precision, so is what that loses: (B̄−B̃)Ã + B̃(Ā−Ã), of rank 2 r. With DoRA,
    whose magnitudes are averaged, the direction is exact.
    """

    name = "fedex-lora"
    paper = "arXiv 2410.09432"
    down = "A, B and the residual"
    cost = "N r d"
    exact = "yes, through the base weights"
    unequal_ranks = "stack"
    supports_server_optimizer = False
    updates_base = True

    def combine(self, A: Tensor, B: Tensor, w: Tensor, dtype: torch.dtype) -> Combined:
        """See ``LowRankMethod.combine``."""
        A_mean, B_mean = (w[:, None, None] * A).sum(1), (w[:, None, None] * B).sum(1)
        A_sent, B_sent = A_mean.to(dtype).to(A.dtype), B_mean.to(dtype).to(B.dtype)
        A_base, B_base = stacked(A - A_sent[:, None], B - B_sent[:, None], w)
        if dtype != A.dtype:
            A_base = torch.cat([A_base, A_sent, A_mean - A_sent], dim=1)
            B_base = torch.cat([B_base, B_mean - B_sent, B_sent], dim=2)
        return Combined(A_sent, B_sent, (A_base, B_base))
