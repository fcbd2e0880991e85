"""Ablation: rescale every client towards the reference instead of rotating it."""

import torch

from .averaging import stream_round
from .base import Method


class Scalar(Method):
    """cᵢ = ⟨Fᵢ, F_ref⟩ / ‖Fᵢ‖² on the factor F that the round aligns, and 1/cᵢ on the other, so that BᵢAᵢ stays.

    Where cᵢ is zero, as towards the B = 0 of a common start, the client stays as it is.
    """

    name = "scalar"
    paper = "ablation in arXiv 2602.23638"
    cost = "N r d"
    exact = "no"

    def needs_reference(self, round):
        return True

    def aggregate(self, round):
        return stream_round(round, self.prepare)

    def prepare(self, round, client, index, layout, reference):
        on = self.alignment.factors(round)
        scaled = {key: client[key] for key in layout.plain}
        for a in layout.adapters:
            wide = torch.float64 if a.dtype == torch.float64 else torch.float32
            A, B = client[a.key_A].detach().to(wide), client[a.key_B].detach().to(wide)
            c = torch.ones((), dtype=wide, device=client.device)
            if "A" in on:
                c = c * _towards(A, reference[a.key_A])
            if "B" in on:
                c = c / _towards(B, reference[a.key_B])
            scaled[a.key_A], scaled[a.key_B] = c * A, B / c
        return scaled, None


def _towards(F, F_ref):
    c = (F * F_ref.detach().to(F.dtype)).sum() / F.square().sum()
    return torch.where(c.isfinite() & (c != 0), c, 1)
