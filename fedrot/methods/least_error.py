"""Alignment by least error: rotations that minimise what averaging the factors loses."""

from .groupwise import GroupwiseMethod


class FedRotLeastError(GroupwiseMethod):
    """Rotates clients so that the aggregation error ‖Σ wᵢBᵢAᵢ − B̄Ā‖_F itself is least, by descent over rotations.

    The result is finally rotated towards the reference, so that its basis stays from round to round.
    """

    name = "fedrot-least-error"
    paper = "fedrot"
    cost = "N² r² d + N² r³"
    exact = "when rotations can make it so (λ = 1)"
    uses = frozenset({"strength", "reflections", "collapse"})
    default_strength = 1.0
    minimises = "error"

    def target(self, round: int, reference: str) -> str | None:
        """See ``Method.target``."""
        return (
            f"each other, so that averaging loses least; the result is turned towards {reference}" if self.aligns else None
        )

    def on(self, round: int) -> str:
        """See ``GroupwiseMethod.on``: the error is that of the product of both factors."""
        return "AB"
