"""LoRA-FAIR (arXiv 2411.14961): averages the factors and corrects B̄, so that B̄Ā comes closer to the mean update."""

import torch
from torch import Tensor

from .low_rank import Combined, LowRankMethod

RIDGE = 0.01  # μ, the paper's, relative to the mean square singular value of Ā


class LoRAFAIR(LowRankMethod):
    """ΔB minimises ‖Σ wᵢBᵢAᵢ − (B̄+ΔB)Ā‖²_F + μ‖ΔB‖²_F: ΔB = E Āᵀ (ĀĀᵀ + μI)⁻¹ with E = Σ wᵢ(Bᵢ−B̄)(Aᵢ−Ā).

    The paper measures the first term by cosine similarity and descends; least squares has the closed form.
    """

    name = "lora-fair"
    paper = "arXiv 2411.14961"
    cost = "N r² d + r³"
    exact = "when the rows of Ā span those of the mean update, up to μ"

    def combine(self, A: Tensor, B: Tensor, w: Tensor, dtype: torch.dtype) -> Combined:
        """See ``LowRankMethod.combine``."""
        A_mean, B_mean = (w[:, None, None] * A).sum(1), (w[:, None, None] * B).sum(1)
        rows = torch.einsum("n,gnrd,gsd->gnrs", w, A - A_mean[:, None], A_mean)
        E = ((B - B_mean[:, None]) @ rows).sum(1)  # E Āᵀ
        G = A_mean @ A_mean.mT
        mu = RIDGE * G.diagonal(dim1=1, dim2=2).mean(1)
        mu = torch.where(mu > 0, mu, 1)[:, None, None]  # Ā = 0 corrects nothing
        eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
        return Combined(A_mean, B_mean + torch.linalg.solve(G + mu * eye, E, left=False))
