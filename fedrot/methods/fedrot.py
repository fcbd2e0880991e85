"""FedRot-LoRA (arXiv 2602.23638): rotate every client's factors towards a common reference, then average."""

from .averaging import average_round, stream_round
from .base import Method
from .mutual import align_mutually
from .rotation import rotations


class FedRot(Method):
    """Rotates as its ``Alignment`` says, towards the reference or each other; at strength 0 not at all: FedIT to the bit."""

    name = "fedrot"
    paper = "arXiv 2602.23638"
    cost = "N r² d + N r³"
    exact = "when the clients' updates differ by rotations only (λ = 1)"
    rotates = True
    unequal_ranks = True
    pads = True

    def __init__(self, alignment, seed=0):
        super().__init__(alignment, seed)
        self.needs_all = bool(alignment.mutual and alignment.strength)

    def _on(self, round):
        return self.alignment.factors(round) if self.alignment.strength else ()

    def needs_reference(self, round):
        return bool(self._on(round))

    def aggregate(self, round):
        if self.needs_all:
            return align_mutually(round, self.alignment)
        on = self._on(round.number)
        if on and any(client.ranks for client in round.clients):
            return stream_round(round, self.prepare)
        return average_round(round.layout, round.clients, round.weights, round.reference, on, self.alignment, round.backend)

    def prepare(self, round, client, index, layout, reference):
        on = self._on(round)
        if not on:
            return client, None
        return client, [rotations(self.alignment, batch, client, reference, on) for batch in layout.batches]
