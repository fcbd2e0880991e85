"""Ablation: rotate every client by a random rotation instead of the one that aligns it."""

import torch

import fedrot_kernels as fk

from ..seeding import generator
from .averaging import stream_round
from .base import Method


class RandomRotation(Method):
    """R is polar(M) of a Gaussian M, hence uniform on the group, then as soft as the alignment's strength says."""

    name = "random-rotation"
    paper = "ablation in arXiv 2602.23638"
    cost = "N r² d + N r³"
    exact = "no"
    rotates = True
    keeps_basis = False

    def __init__(self, alignment, seed=0):
        if alignment.mutual:
            raise ValueError("random-rotation needs a strength that is a number, and no consensus or least error")
        super().__init__(alignment, seed)

    def aggregate(self, round):
        return stream_round(round, self.prepare)

    def prepare(self, round, client, index, layout, reference):
        numbers = generator(self.seed, round, index)
        rotations = []
        for batch in layout.batches:
            a = batch.adapters[0]
            M = torch.randn(len(batch.adapters), a.rank, a.rank, generator=numbers, dtype=torch.float64)
            R, _ = fk.procrustes(M, strength=self.alignment.fixed_strength, special=self.alignment.group == "SO")
            rotations.append(R.to(client.device, a.dtype if a.dtype == torch.float64 else torch.float32))
        return client, rotations
