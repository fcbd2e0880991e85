"""Ablation: rescale every client towards the reference instead of rotating it."""

import torch
from torch import Tensor

from fedrot_kernels import Rotations, widen

from ..adapters.layout import Layout
from ..adapters.update import StateDict, Update
from .averaging import stream_round
from .base import Method
from .rotation import aligned_factors
from .round import Averages, Round


class Scalar(Method):
    """Scales the factor F that the round aligns by cᵢ = ⟨Fᵢ, F_ref⟩ / ‖Fᵢ‖² and the other by 1/cᵢ, so that BᵢAᵢ stays.

    Where cᵢ is zero, as towards the B = 0 of a common start, the client stays as it is.
    """

    name = "scalar"
    paper = "ablation in arXiv 2602.23638"
    cost = "N r d"
    exact = "no"
    ablation = True
    rescales = True
    uses = frozenset({"align_on"})

    def needs_reference(self, round: int) -> bool:
        """See ``Method.needs_reference``."""
        return True

    def aggregate(self, round: Round) -> Averages:
        """See ``Method.aggregate``."""
        return stream_round(round, self.prepare)

    def prepare(
        self, round: int, client: Update, position: int, layout: Layout, reference: Update | None
    ) -> tuple[StateDict, list[Rotations] | None]:
        """See ``Method.prepare``."""
        assert reference is not None
        on = aligned_factors(self.options.align_on, round)
        scaled = {key: client[key] for key in layout.other_keys}
        for a in layout.adapters:
            A, B = widen(client[a.key_A]), widen(client[a.key_B])
            c = torch.ones((), dtype=A.dtype, device=client.device)
            if "A" in on:
                c = c * _scale_towards(A, reference[a.key_A])
            if "B" in on:
                c = c / _scale_towards(B, reference[a.key_B])
            scaled[a.key_A], scaled[a.key_B] = c * A, B / c
        return scaled, None


def _scale_towards(F: Tensor, F_ref: Tensor) -> Tensor:
    """⟨F, F_ref⟩ / ‖F‖², or 1 where that is zero or not finite."""
    c = (F * F_ref.detach().to(F.dtype)).sum() / F.square().sum()
    return torch.where(c.isfinite() & (c != 0), c, 1)
