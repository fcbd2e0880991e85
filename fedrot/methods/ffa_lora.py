"""FFA-LoRA (arXiv 2403.12313): A stays as it was drawn, clients train B only, and the mean of B is exact."""

from ..options import Factor
from .fedit import FedIT


class FFALoRA(FedIT):
    """Freezes A at the shared initialisation."""

    name = "ffa-lora"
    paper = "arXiv 2403.12313"
    up = down = "B"
    cost = "N r d_out"
    exact = "yes"
    needs_shared_start = True

    def trains(self, round: int) -> tuple[Factor, ...]:
        """See ``Method.trains``."""
        return ("B",)
