"""RoLoRA (arXiv 2502.01755): clients train B in one round and A in the next, so that every mean is exact."""

from ..options import Factor
from .fedit import FedIT


class RoLoRA(FedIT):
    """Even rounds train B (A could not move while B is zero), odd rounds A."""

    name = "rolora"
    paper = "arXiv 2502.01755"
    up = down = "B or A in turn"
    cost = "N r d / 2"
    exact = "yes"
    needs_shared_start = True

    def trains(self, round: int) -> tuple[Factor, ...]:
        """See ``Method.trains``."""
        return ("A",) if round % 2 else ("B",)
