"""The registry of aggregation methods: one name for the API, the command line and the simulator."""

from ..options import OF_UNEQUAL_RANKS, AggregationOptions
from .adaptive import FedRotAdaptive
from .base import Method
from .consensus import FedRotConsensus
from .fedex_lora import FedExLoRA
from .fedit import FedIT
from .fedmomentum import FedMomentum
from .fedrot import FedRot
from .fedsa_lora import FedSALoRA
from .fedsvd import FedSVD
from .ffa_lora import FFALoRA
from .flexlora import FlexLoRA
from .flora import FLoRA
from .flora_na import FLoRANA
from .glora import GLoRA
from .least_error import FedRotLeastError
from .lora_fair import LoRAFAIR
from .random_rotation import RandomRotation
from .rolora import RoLoRA
from .scalar import Scalar

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(FedIT, FedRot, FedRotConsensus, FedRotLeastError, FedRotAdaptive, FFALoRA, FedSVD, RoLoRA),
        *(FlexLoRA, GLoRA, FLoRA, FedExLoRA, FedMomentum, FedSALoRA, LoRAFAIR, FLoRANA, RandomRotation, Scalar),
    )
}
"""The aggregation methods, name → class."""


def make_method(options: AggregationOptions) -> Method:
    """Make the method that the options name.

    Raises:
        ValueError: no such method, an option that plays no part in it, or, with ``robust`` or ``clip``, a method that has no
            updates to compare.
    """
    if options.method not in METHODS:
        raise ValueError(f"unknown method {options.method!r}; known methods: {', '.join(METHODS)}")
    method = METHODS[options.method](options)
    for name in OF_UNEQUAL_RANKS:
        if (value := getattr(options, name)) not in (None, "none") and name not in method.uses:
            users = [other.name for other in METHODS.values() if name in other.uses]
            raise ValueError(f"{name}={value!r} plays no part in {method.name}; it is for {', '.join(users)}")
    if options.compares_clients and method.returns() != ("A", "B"):
        raise ValueError(
            f"robust and clip weigh the updates B·A, and {method.name} averages {' and '.join(method.returns())} alone: "
            "leave both out, or take another method"
        )
    return method


def methods_table() -> str:
    """A table of methods: what they communicate, cost and lose per adapter and round. Ablations follow below it, by name."""
    rows = [("method", "client sends", "client receives", "server's work", "is Σ wᵢsᵢBᵢAᵢ", "from")]
    rows += [(m.name, m.up, m.down, m.cost, m.exact, m.paper) for m in METHODS.values() if not m.ablation]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    ablations = ", ".join(m.name for m in METHODS.values() if m.ablation)
    return "\n".join(
        [
            *lines,
            "",
            "N clients, rank r, d = d_in + d_out. Heads and biases are sent and averaged by all.",
            f"Ablations of the paper, for comparisons only: {ablations}.",
        ]
    )
