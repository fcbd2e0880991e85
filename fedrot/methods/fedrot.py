"""FedRot-LoRA (arXiv 2602.23638): rotate every client's factors towards a common reference, then average."""

import torch

from ..alignment import check_rotations
from .base import Method


class FedRot(Method):
    """Rotates towards the reference as its ``Alignment`` says."""

    name = "fedrot"
    rotates = True

    @property
    def needs_reference(self):
        return self.alignment.strength > 0

    def rotations(self, layout, clients, reference, round):
        if not self.needs_reference:
            return None  # exactly FedIT, to the bit
        rotations = []
        for batch in layout.batches:
            M = [self.alignment.cross_covariance(batch, client, reference, round) for client in clients]
            R = self.alignment.rotation(torch.stack(M))
            for client, of_client in zip(clients, R, strict=True):
                check_rotations(of_client, batch, client.name)
            rotations.append(R)
        return rotations
