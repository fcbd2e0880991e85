"""What is aligned with what, how far, and in which group."""

from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

Factor = Literal["A", "B"]


AlignOn = Literal["A", "B", "alternate", "joint", "error"]


RotationGroup = Literal["SO", "O", "GL"]


Strength = float | Literal["auto"]


@dataclass(frozen=True)
class Alignment:
    """The options of FedRot-LoRA (arXiv 2602.23638), and those beyond it.

    Attributes:
        align_on: the factor whose distance to the reference is made least: "A", "B", "alternate" (odd rounds A, even
            rounds B, as in the paper) or "joint" (the sum of both distances, each relative to its reference's norm); or
            "error": not a distance but the aggregation error itself.
        strength: λ in [0, 1]; 0 does not rotate (FedIT), 1 is the full Procrustes rotation; "auto" chooses it for every
            adapter by the error that it predicts. None becomes 0.5, and 1 with consensus or "error".
        group: "SO" for rotations (det = +1, the paper's soft path), "O" with reflections, or with "error" "GL": invertible
            matrices.
        consensus: clients are rotated towards each other, not towards a reference, by both factors unless ``align_on``
            is one of them.
    """

    align_on: AlignOn = "alternate"
    strength: Strength | None = None
    group: RotationGroup = "SO"
    consensus: bool = False

    def __post_init__(self) -> None:
        least_error = self.align_on == "error"
        if self.strength is None:
            object.__setattr__(self, "strength", 1.0 if self.consensus or least_error else 0.5)
        for name, value, allowed in (("align_on", self.align_on, AlignOn), ("group", self.group, RotationGroup)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")
        if self.strength != "auto" and (not isinstance(self.strength, Real) or not 0 <= self.strength <= 1):
            raise ValueError(
                f"strength must be between 0 (no rotation) and 1 (full rotation), or auto, got {self.strength!r}"
            )
        if self.strength == "auto" and least_error:
            raise ValueError(
                'strength="auto" looks for the least error, which align_on="error" has at 1: leave strength out'
            )
        if self.group == "GL" and not least_error:
            raise ValueError('group="GL" needs align_on="error": no invertible matrix is closest to a reference')
        if self.group == "GL" and self.strength not in (0, 1):
            raise ValueError(f"strength is {self.strength}, but there is no part of an invertible matrix: leave it out")

    @property
    def mutual(self) -> bool:
        """Whether one client's rotation depends on the others, so that all of a round are needed at once."""
        return self.consensus or self.align_on == "error" or self.strength == "auto"

    @property
    def fixed_strength(self) -> float:
        """λ, where it is a number."""
        assert isinstance(self.strength, Real)
        return float(self.strength)

    def factors(self, round: int) -> tuple[Factor, ...]:
        """The factors aligned in a round."""
        if self.align_on == "A" or self.align_on == "B":
            return (self.align_on,)
        if self.align_on == "alternate" and not self.consensus:
            return ("A",) if round % 2 else ("B",)
        return ("A", "B")
