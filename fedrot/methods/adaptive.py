"""FedRot-LoRA whose strength λ is chosen for every adapter and round."""

from .groupwise import GroupwiseMethod
from .rotation import aligned_factors


class FedRotAdaptive(GroupwiseMethod):
    """Rotates towards the reference as FedRot does, by the λ among 0, 0.1, …, 1 whose predicted aggregation error is least.

    Strengths whose errors differ by no more than 1 % count as equal; the one nearest 0.5, the paper's, is taken. The report
    gives every adapter's λ.
    """

    name = "fedrot-adaptive"
    paper = "fedrot"
    cost = "N² r² d + N² r³"
    exact = "when the clients' updates differ by rotations only"
    uses = frozenset({"align_on", "reflections", "collapse"})
    minimises = "reference"

    @property
    def chooses_strength(self) -> bool:
        """See ``GroupwiseMethod.chooses_strength``."""
        return True

    def target(self, round: int, reference: str) -> str | None:
        """See ``Method.target``."""
        return reference

    def on(self, round: int) -> str:
        """See ``GroupwiseMethod.on``."""
        return "".join(aligned_factors(self.options.align_on, round))
