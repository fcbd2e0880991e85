"""FedEx-LoRA (arXiv 2410.09432): averages the factors and adds what that loses to the base weights."""

from .low_rank import Combined, LowRankMethod, stacked


class FedExLoRA(LowRankMethod):
    """The residual Σ wᵢBᵢAᵢ − B̄Ā = Σ wᵢ(Bᵢ−B̄)(Aᵢ−Ā) is added to the base, as factors of rank N r."""

    name = "fedex-lora"
    paper = "arXiv 2410.09432"
    down = "A, B and the residual"
    cost = "N r d"
    exact = "yes, through the base weights"
    unequal_ranks = True
    folds = True

    def combine(self, A, B, w):
        A_mean, B_mean = (w[:, None, None] * A).sum(1), (w[:, None, None] * B).sum(1)
        return Combined(A_mean, B_mean, stacked(A - A_mean[:, None], B - B_mean[:, None], w))
