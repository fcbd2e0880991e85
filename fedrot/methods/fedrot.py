"""FedRot-LoRA (arXiv 2602.23638): rotate every client's factors towards a common reference, then average."""

from fedrot_kernels import Rotations

from ..adapters.layout import Layout
from ..adapters.update import StateDict, Update
from ..options import Factor
from .averaging import average_round, stream_round
from .base import Alignment, Method
from .consensus import FedRotConsensus
from .rotation import aligned_factors, rotations
from .round import Averages, Round


class FedRot(Method):
    """Rotates clients towards the reference, at λ = 0 not at all: then the result is FedIT's, to the bit.

    A whole round without a reference is averaged as by fedrot-consensus with the same options.
    """

    name = "fedrot"
    paper = "arXiv 2602.23638"
    cost = "N r² d + N r³"
    exact = "when the clients' updates differ by rotations only (λ = 1)"
    uses = frozenset({"align_on", "strength", "reflections", "collapse"})
    unequal_ranks = "pad"

    @property
    def needs_all(self) -> bool:  # type: ignore[override]
        """Whether all updates are needed at once: to know the ranks of all."""
        return self.options.collapse != "none"

    def _on(self, round: int) -> tuple[Factor, ...]:
        """The factors that are aligned in a round, none at λ = 0."""
        return aligned_factors(self.options.align_on, round) if self.strength else ()

    def needs_reference(self, round: int) -> bool:
        """See ``Method.needs_reference``."""
        return bool(self._on(round))

    def without_reference(self) -> Method:
        """The consensus: rotating everyone towards one client would add that client's share of the error."""
        return FedRotConsensus(self.options) if self.strength else self

    def target(self, round: int, reference: str) -> str | None:
        """See ``Method.target``."""
        return reference if self._on(round) else None

    def alignment(self, round: int) -> Alignment:
        """See ``Method.alignment``."""
        return Alignment(self._on(round), self.strength, self.options.reflections)

    def aggregate(self, round: Round) -> Averages:
        """See ``Method.aggregate``."""
        on = self._on(round.index)
        if on and any(client.ranks for client in round.clients):
            return stream_round(round, self.prepare)
        return average_round(round, self.options, on, self.strength)

    def prepare(
        self, round: int, client: Update, position: int, layout: Layout, reference: Update | None
    ) -> tuple[StateDict, list[Rotations] | None]:
        """See ``Method.prepare``."""
        on = self._on(round)
        if not on:
            return client, None
        assert reference is not None
        reflections = self.options.reflections
        return client, [
            rotations(group, client, reference, on, self.strength, reflections=reflections) for group in layout.groups
        ]
