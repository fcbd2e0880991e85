"""Ablation: rotate every client by a random rotation instead of the one that aligns it."""

import torch

from fedrot_kernels import Rotations, procrustes, working_dtype

from ..adapters.layout import Layout
from ..adapters.update import StateDict, Update
from ..seeding import generator
from .averaging import stream_round
from .base import Method
from .round import Averages, Round


class RandomRotation(Method):
    """Rotates by the polar factor of a Gaussian matrix, which is uniform on the group, softened by λ."""

    name = "random-rotation"
    paper = "ablation in arXiv 2602.23638"
    cost = "N r² d + N r³"
    exact = "no"
    ablation = True
    uses = frozenset({"strength", "reflections", "seed"})
    supports_server_optimizer = False
    draws_per_client = True

    def target(self, round: int, reference: str) -> str | None:
        """See ``Method.target``."""
        return "nothing, but at random" if self.strength else None

    def aggregate(self, round: Round) -> Averages:
        """See ``Method.aggregate``."""
        return stream_round(round, self.prepare)

    def prepare(
        self, round: int, client: Update, position: int, layout: Layout, reference: Update | None
    ) -> tuple[StateDict, list[Rotations] | None]:
        """See ``Method.prepare``."""
        numbers = generator(self.options.seed, round, position)
        rotations = []
        for group in layout.groups:
            a = group.adapters[0]
            shape = len(group.adapters), a.rank, a.rank
            M = torch.randn(shape, generator=numbers, dtype=torch.float64, device="cpu")
            drawn = procrustes(M, strength=self.strength, reflections=self.options.reflections)
            rotations.append(drawn._replace(R=drawn.R.to(client.device, working_dtype(a.dtype))))
        return client, rotations
