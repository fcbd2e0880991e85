"""FedRot-LoRA (arXiv 2602.23638): rotate every client's factors towards a common reference, then average."""

from .base import Method


class FedRot(Method):
    """Rotates towards the reference as its ``Alignment`` says; at strength 0 not at all, which is FedIT to the bit."""

    name = "fedrot"
    rotates = True

    def aligned_on(self, round):
        return self.alignment.factors(round) if self.alignment.strength else ()
