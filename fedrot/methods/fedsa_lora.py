"""FedSA-LoRA (arXiv 2410.01463): clients share A and keep their own B."""

from ..options import Factor
from .fedit import FedIT


class FedSALoRA(FedIT):
    """Averages A; B is personal. Heads and other tensors that are no factors are averaged, as by every method.

    The report gives the error Σ wᵢBᵢAᵢ − Σ wᵢBᵢĀ, because client i continues from BᵢĀ.
    """

    name = "fedsa-lora"
    paper = "arXiv 2410.01463"
    up = down = "A"
    cost = "N r d_in"
    exact = "no: client i continues from BᵢĀ"

    def returns(self) -> tuple[Factor, ...]:
        """See ``Method.returns``."""
        return ("A",)
