"""FlexLoRA (arXiv 2402.11505): the best approximation of rank r of the mean update."""

import torch
from torch import Tensor

from .low_rank import Combined, LowRankMethod, stacked


class FlexLoRA(LowRankMethod):
    """B̄Ā is the truncated SVD of Σ wᵢsᵢBᵢAᵢ / s, its singular values shared evenly: B̄ = U√Σ, Ā = √Σ Vᵀ.

    With S_B S_A the mean update, S_B = Q_B R_B and S_Aᵀ = Q_A R_A, its SVD is that of R_B R_Aᵀ, of N r rows and columns.
    """

    name = "flexlora"
    paper = "arXiv 2402.11505"
    cost = "N² r² d + N³ r³"
    exact = "when the mean update has rank r"
    unequal_ranks = "stack"
    supports_server_optimizer = False

    def combine(self, A: Tensor, B: Tensor, w: Tensor, dtype: torch.dtype) -> Combined:
        """See ``LowRankMethod.combine``."""
        r = A.shape[2]
        S_A, S_B = stacked(A, B, w)
        Q_B, R_B = torch.linalg.qr(S_B)
        Q_A, R_A = torch.linalg.qr(S_A.mT)
        M = R_B @ R_A.mT
        if not bool(M.isfinite().all()):  # the products overflow, which the SVD would not report by its name
            return Combined(torch.full_like(A[:, 0], torch.nan), torch.full_like(B[:, 0], torch.nan))
        U, sigma, Vt = torch.linalg.svd(M, full_matrices=False)
        # Fewer directions than r where d or N r is smaller: the rest of the factors is zero.
        root = sigma[:, :r].sqrt()
        A_out, B_out = A.new_zeros(A[:, 0].shape), B.new_zeros(B[:, 0].shape)
        k = root.shape[1]
        A_out[:, :k] = root[:, :, None] * (Vt[:, :r] @ Q_A.mT)
        B_out[:, :, :k] = (Q_B @ U[:, :, :r]) * root[:, None]
        return Combined(A_out, B_out)
