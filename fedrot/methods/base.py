"""What a method decides: which factors clients train and share, and how a round's updates become one."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ..adapters.layout import Layout
from ..adapters.update import StateDict, Update
from ..errors import UpdateError
from ..options import Alignment, Factor
from .round import Averages, Round


class Method(ABC):
    """An aggregation method.

    Attributes:
        name: in the registry.
        paper: where it is from.
        up: what a client sends each round.
        down: what it receives.
        cost: of the server's work for one adapter from N clients, d = d_in + d_out.
        exact: whether, or when, the result is Σ wᵢsᵢBᵢAᵢ.
        rotates: whether the strength λ plays a part.
        needs_shared_start: whether clients must begin with the same adapter.
        needs_all: whether all updates are needed at once, so that they cannot be added one by one.
        unequal_ranks: whether clients' ranks and scalings may differ.
        pads: whether clients are then padded to the ranks and the scaling of the reference.
        keeps_basis: whether each result is a mean in the basis of the last, towards which a server optimizer can step.
        folds: whether a part of the result is to be added to the base weights.
        cannot_merge: endings of keys that clients' updates may not have.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    up: ClassVar[str] = "A, B"
    down: ClassVar[str] = "A, B"
    cost: ClassVar[str]
    exact: ClassVar[str]
    rotates: ClassVar[bool] = False
    needs_shared_start: ClassVar[bool] = False
    needs_all: bool = False
    unequal_ranks: ClassVar[bool] = False
    pads: ClassVar[bool] = False
    keeps_basis: ClassVar[bool] = True
    folds: ClassVar[bool] = False
    cannot_merge: ClassVar[tuple[str, ...]] = ()

    def __init__(self, alignment: Alignment, seed: int = 0):
        self.alignment, self.seed = alignment, seed

    def trains(self, round: int) -> tuple[Factor, ...]:
        """The factors that clients train in a round; the others are frozen, the same in every update."""
        return ("A", "B")

    def returns(self) -> tuple[Factor, ...]:
        """The factors that the server averages and returns; each client keeps its own of the others."""
        return ("A", "B")

    def check(self, layout: Layout) -> None:
        """Raise UpdateError if the method cannot aggregate updates of this layout."""
        if key := next((key for key in layout.plain if key.endswith(self.cannot_merge)), None):
            raise UpdateError(
                f"{key} {layout.specs[key].shape}: {self.name} merges B·A into the base weights and cannot merge this; use "
                "fedex-lora, or leave it out of the LoRA configuration"
            )

    def needs_reference(self, round: int) -> bool:
        """Whether a client's part in the average depends on the reference."""
        return False

    @abstractmethod
    def aggregate(self, round: Round) -> Averages:
        """A round's updates as one."""

    def prepare(
        self, round: int, client: Update, index: int, layout: Layout, reference: Update | None
    ) -> tuple[StateDict, list[Tensor] | None]:
        """A client's tensors as they enter the mean, and for every batch of the layout its rotations (G, r, r), if any.

        What ``add`` does with a client whose update will not be kept.
        """
        return client, None
