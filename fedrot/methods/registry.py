"""The registry of aggregation methods: one name for the API, the command line and the simulator."""

from ..options import Alignment
from .base import Method
from .fedex_lora import FedExLoRA
from .fedit import FedIT
from .fedrot import FedRot
from .fedsa_lora import FedSALoRA
from .ffa_lora import FFALoRA
from .flexlora import FlexLoRA
from .flora import FLoRA
from .lora_fair import LoRAFAIR
from .random_rotation import RandomRotation
from .rolora import RoLoRA
from .scalar import Scalar

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        FedIT, FedRot, FFALoRA, RoLoRA, FlexLoRA, FLoRA, FedExLoRA, FedSALoRA, LoRAFAIR, RandomRotation, Scalar
    )
}  # fmt: skip


def get_method(name: str, alignment: Alignment, seed: int = 0) -> Method:
    """The method of that name.

    Raises:
        ValueError: no such method.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name](alignment, seed)


def methods_table() -> str:
    """What each method communicates per adapter and round, what one adapter costs the server, and when it is exact."""
    rows = [("method", "client sends", "client receives", "server's work", "is Σ wᵢsᵢBᵢAᵢ", "from")]
    rows += [(m.name, m.up, m.down, m.cost, m.exact, m.paper) for m in METHODS.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", "N clients, rank r, d = d_in + d_out. Heads and biases are sent and averaged by all."])
