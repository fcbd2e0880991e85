"""What a method decides: on which factors clients are aligned before they are averaged."""

from abc import ABC, abstractmethod
from typing import ClassVar

from ..alignment import Alignment, Factor


class Method(ABC):
    """An aggregation method. Rotating and averaging are the same for all."""

    name: ClassVar[str]
    rotates: ClassVar[bool]  # whether the alignment, and so its strength, plays a part

    def __init__(self, alignment: Alignment):
        self.alignment = alignment

    @abstractmethod
    def aligned_on(self, round: int) -> tuple[Factor, ...]:
        """The factors whose distance to the reference is made least in a round; none to average without rotating."""
