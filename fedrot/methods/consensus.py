"""Generalised Procrustes alignment (Gower, 1975): rotate clients to each other, not to a reference."""

from .groupwise import GroupwiseMethod


class FedRotConsensus(GroupwiseMethod):
    """Rotates every client towards the mean of all, repeatedly, by both factors unless ``align_on`` is one of them.

    The result is finally rotated towards the reference, so that its basis stays from round to round. Without a reference
    that is the update of the largest weight.
    """

    name = "fedrot-consensus"
    paper = "Gower, 1975, on LoRA factors"
    cost = "N² r² d + N² r³"
    exact = "when the clients' updates differ by rotations only (λ = 1)"
    uses = frozenset({"align_on", "strength", "reflections", "collapse"})
    default_strength = 1.0
    minimises = "consensus"

    def target(self, round: int, reference: str) -> str | None:
        """See ``Method.target``."""
        return f"the consensus of all clients, which is itself turned towards {reference}" if self.aligns else None

    def on(self, round: int) -> str:
        """See ``GroupwiseMethod.on``."""
        return self.options.align_on if self.options.align_on in ("A", "B") else "AB"
