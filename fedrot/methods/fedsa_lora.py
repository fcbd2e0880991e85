"""FedSA-LoRA (arXiv 2410.01463): clients share A and keep their own B."""

from .fedit import FedIT


class FedSALoRA(FedIT):
    """Averages A; B is personal. Heads and other plain tensors are averaged as by every method.

    The report's error is that of the mean of what clients continue from: Σ wᵢBᵢAᵢ − Σ wᵢBᵢĀ.
    """

    name = "fedsa-lora"
    paper = "arXiv 2410.01463"
    up = down = "A"
    cost = "N r d_in"
    exact = "no: client i continues from BᵢĀ"

    def returns(self):
        return ("A",)
