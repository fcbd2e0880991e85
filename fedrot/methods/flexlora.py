"""FlexLoRA (arXiv 2402.11505): the best approximation of rank r of the mean update."""

import torch
from torch import Tensor

from .low_rank import Combined, LowRankMethod
from .mean_update import count_energy, leading_svd, mean_svd, shared_evenly


class FlexLoRA(LowRankMethod):
    """B̄Ā is the truncated SVD of Σ wᵢsᵢBᵢAᵢ / s, its singular values shared evenly: B̄ = U√Σ, Ā = √Σ Vᵀ.

    With ``energy`` the server chooses the rank of every module (FLoRIST, arXiv 2506.09199). The results of HLoRA (arXiv
    2503.00813), a rank for each client, are ``fedrot.truncate`` of this one.
    """

    name = "flexlora"
    paper = "arXiv 2402.11505"
    cost = "N² r² d + N³ r³"
    exact = "when the mean update has rank r"
    uses = frozenset({"energy", "server_rank", "collapse"})
    unequal_ranks = "stack"
    supports_server_optimizer = False

    def combine(self, A: Tensor, B: Tensor, w: Tensor, dtype: torch.dtype) -> Combined:
        """See ``LowRankMethod.combine``."""
        r, energy = self.options.server_rank or A.shape[2], self.options.energy
        svd = leading_svd(A, B, w, r) if energy is None else mean_svd(A, B, w)
        if svd is None:
            return Combined(torch.full_like(A[:, 0], torch.nan), torch.full_like(B[:, 0], torch.nan))
        if energy is None:
            return Combined(*shared_evenly(svd, slice(r), r))
        most = self.options.server_rank or svd.sigma.shape[1]
        ranks = [min(k, most) for k in count_energy(svd.sigma, energy, A.shape[1] * A.shape[2])]
        return Combined(*shared_evenly(svd, slice(max(ranks)), max(ranks)), ranks=ranks)
