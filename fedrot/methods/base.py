"""What a method decides: how every client's factors are rotated before they are averaged."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ..adapters import Layout
from ..alignment import Alignment
from ..updates import Update


class Method(ABC):
    """An aggregation method. Averaging itself is the same for all."""

    name: ClassVar[str]
    rotates: ClassVar[bool]  # whether the alignment, and so its strength, plays a part

    def __init__(self, alignment: Alignment):
        self.alignment = alignment

    @property
    @abstractmethod
    def needs_reference(self) -> bool:
        """Whether ``rotations`` looks at the reference."""

    @abstractmethod
    def rotations(
        self, layout: Layout, clients: Sequence[Update], reference: Update | None, round: int
    ) -> list[Tensor] | None:
        """For every batch of the layout R (N, G, r, r), float32 or float64; None to average without rotating."""
