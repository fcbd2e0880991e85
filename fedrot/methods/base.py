"""The decisions of a method: which factors clients train and share, and how a round's updates become one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedrot_kernels import Rotations

from ..adapters.common import UnequalRanks
from ..adapters.layout import Layout
from ..adapters.update import StateDict, Update
from ..errors import UpdateError
from ..options import OF_UNEQUAL_RANKS, AggregationOptions, Factor
from .round import Averages, Round


@dataclass(frozen=True)
class Alignment:
    """How clients are rotated towards the reference.

    Attributes:
        on: the factors that count; without any, clients are not rotated.
        strength: λ.
        reflections: whether rotations are in O(r), not SO(r).
    """

    on: tuple[Factor, ...] = ()
    strength: float = 1.0
    reflections: bool = False


class Method(ABC):
    """An aggregation method.

    Attributes:
        name: the method's name in the registry.
        paper: the paper that the method is from.
        up: what a client sends each round.
        down: what a client receives each round.
        cost: the server's work for one adapter from N clients, d = d_in + d_out.
        exact: whether, or when, the result is Σ wᵢsᵢBᵢAᵢ.
        ablation: whether the method is an ablation of a paper, and no method to use.
        rescales: whether clients' factors are rescaled before they are averaged; then no report tells of the plain average.
        uses: the options that play a part in the method, beside those that play one in all.
        default_strength: λ where the options leave it open.
        needs_shared_start: whether clients must begin with the same adapter.
        needs_all: whether all updates are needed at once, so that they cannot be added one by one.
        unequal_ranks: "no" if clients must have one rank and scaling; "pad" if clients of smaller rank are padded to the
            ranks and the scaling of the reference; "stack" if factors of any rank and scaling are combined.
        supports_server_optimizer: whether each result is a mean in the basis of the last one, towards which a server
            optimizer can step.
        updates_base: whether a part of the result is to be added to the base weights.
        cannot_merge: endings of keys that clients' updates may not have.
        draws_per_client: whether what is drawn depends on a client's place in the round, which servers that share a round
            would give twice.
        options: the options of the aggregation.
        strength: λ, as the options or the method's default give it.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    up: ClassVar[str] = "A, B"
    down: ClassVar[str] = "A, B"
    cost: ClassVar[str]
    exact: ClassVar[str]
    ablation: ClassVar[bool] = False
    rescales: ClassVar[bool] = False
    uses: ClassVar[frozenset[str]] = frozenset()
    default_strength: ClassVar[float] = 0.5
    needs_shared_start: ClassVar[bool] = False
    unequal_ranks: ClassVar[UnequalRanks] = "no"
    supports_server_optimizer: ClassVar[bool] = True
    updates_base: ClassVar[bool] = False
    cannot_merge: ClassVar[tuple[str, ...]] = ()
    draws_per_client: ClassVar[bool] = False
    needs_all: bool = False

    def __init__(self, options: AggregationOptions):
        """Take the options that play a part in the method."""
        self.options = options
        self.strength = self.default_strength if options.strength is None else options.strength

    def trains(self, round: int) -> tuple[Factor, ...]:
        """The factors that clients train in the round of this index; the others are frozen, the same in every update."""
        return ("A", "B")

    def returns(self) -> tuple[Factor, ...]:
        """The factors that the server averages and returns; each client keeps its own of the others."""
        return ("A", "B")

    @property
    def changes_ranks(self) -> bool:
        """Whether the server chooses the ranks of the result, which then need not be those of a client."""
        options = self.options
        return "server_rank" in self.uses and (options.server_rank is not None or options.energy is not None)

    def check_one_rank(self) -> None:
        """Raise ValueError for an option that is for clients of unequal ranks, where clients have one rank."""
        for name in OF_UNEQUAL_RANKS if self.changes_ranks or self.options.collapse != "none" else ():
            if (value := getattr(self.options, name)) not in (None, "none"):
                raise ValueError(
                    f"{name}={value!r} is for clients of unequal ranks, and these have one rank, that of the server's "
                    f"adapter: leave {name} out, or take fedrot.aggregate and fedrot.truncate"
                )

    def recast(self, mean: dict[str, Tensor], layout: Layout, round: int) -> dict[str, Tensor]:
        """Give a round's mean the factors that the next round starts from, with the same B·A.

        Args:
            mean: canonical key → mean, frozen factors as clients have them.
            layout: of the mean.
            round: the round's index.
        """
        return mean

    def check(self, layout: Layout) -> None:
        """Raise UpdateError if the method cannot aggregate updates of this layout."""
        if key := next((key for key in layout.other_keys if key.endswith(self.cannot_merge)), None):
            raise UpdateError(
                f"{key} {layout.specs[key].shape}: {self.name} merges B·A into the base weights and cannot merge this; use "
                "fedex-lora, or leave it out of the LoRA configuration"
            )

    def needs_reference(self, round: int) -> bool:
        """Whether a client's part in the average depends on the reference."""
        return False

    def without_reference(self) -> "Method":
        """The method by which a whole round is averaged whose clients have no reference."""
        return self

    def target(self, round: int, reference: str) -> str | None:
        """Words for what clients are rotated towards in the round of this index; None if they are not rotated.

        Args:
            round: the round's index.
            reference: words for the reference, or for the client that stands in for it.
        """
        return None

    def alignment(self, round: int) -> Alignment | None:
        """What ``prepare`` does in the round of this index, if it does no more than to rotate towards the reference."""
        return Alignment() if type(self).prepare is Method.prepare else None

    @abstractmethod
    def aggregate(self, round: Round) -> Averages:
        """Average a round's updates."""

    def prepare(
        self, round: int, client: Update, position: int, layout: Layout, reference: Update | None
    ) -> tuple[StateDict, list[Rotations] | None]:
        """Make of one client what enters the mean: the step of ``add``, which keeps no update.

        Args:
            round: the round's index.
            client: the client's update, checked.
            position: the client's place among all that sent something, from 0.
            layout: of the result.
            reference: what clients are aligned to, or None.

        Returns:
            The client's tensors, and for every group of the layout the client's rotations, R (G, r, r), or None.
        """
        return client, None
