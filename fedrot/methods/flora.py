"""FLoRA (arXiv 2409.05976): the mean update, the clients' factors stacked, goes into the base, and they begin anew."""

import torch
from torch import Tensor

from ..seeding import generator
from .low_rank import Combined, LowRankMethod
from .round import Averages, Round


class FLoRA(LowRankMethod):
    """[w₁B₁ … w_N B_N] [A₁; …; A_N] = Σ wᵢBᵢAᵢ goes into the base; A is drawn as PEFT does by default, B is zero."""

    name = "flora"
    paper = "arXiv 2409.05976"
    down = "A, B of all clients"
    cost = "N r d"
    exact = "yes, through the base weights"
    unequal_ranks = "stack"
    supports_server_optimizer = False
    updates_base = True
    uses = frozenset({"seed"})
    cannot_merge = (".lora_B.bias", ".lora_magnitude_vector")

    def combine(self, A: Tensor, B: Tensor, w: Tensor, dtype: torch.dtype) -> Combined:
        """See ``LowRankMethod.combine``."""
        base = A.flatten(1, 2), (w[:, None, None] * B).transpose(1, 2).flatten(2)
        return Combined(torch.zeros_like(A[:, 0]), torch.zeros_like(B[:, 0]), base)

    def aggregate(self, round: Round) -> Averages:
        """See ``Method.aggregate``; then draw the factors that clients begin anew with."""
        averages = super().aggregate(round)
        numbers = generator(self.options.seed, round.index)
        for a in round.layout.adapters:
            A, B = averages.mean[a.key_A], averages.mean[a.key_B]
            if "lora_embedding_" in a.key_A:  # PEFT draws B of embeddings
                B.copy_(torch.randn(B.shape, generator=numbers, device="cpu"))
            else:  # torch's initialisation of a linear layer
                bound = a.d_in**-0.5
                A.copy_((2 * torch.rand(A.shape, generator=numbers, device="cpu") - 1) * bound)
        return averages
