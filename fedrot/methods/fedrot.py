"""FedRot-LoRA (arXiv 2602.23638): rotate every client's factors towards a common reference, then average."""

from ..round import average_round
from .base import Method


class FedRot(Method):
    """Rotates towards the reference as its ``Alignment`` says; at strength 0 not at all, which is FedIT to the bit."""

    name = "fedrot"
    paper = "arXiv 2602.23638"
    cost = "N r² d + N r³"
    exact = "when the clients' updates differ by rotations only (λ = 1)"
    rotates = True

    def _on(self, round):
        return self.alignment.factors(round) if self.alignment.strength else ()

    def needs_reference(self, round):
        return bool(self._on(round))

    def aggregate(self, round):
        on = self._on(round.number)
        return average_round(round.layout, round.clients, round.weights, round.reference, on, self.alignment, round.backend)

    def prepare(self, round, client, index, layout, reference):
        on = self._on(round)
        if not on:
            return client, None
        return client, [self.alignment.rotations(batch, client, reference, on) for batch in layout.batches]
