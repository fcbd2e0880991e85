"""What a robust rule chose: data for the report."""

from dataclasses import dataclass

_SHOWN = 8  # clients that a line of the report names


@dataclass(frozen=True)
class Choice:
    """Which clients of a round count, and why; of N clients of positive weight.

    Attributes:
        rule: the option ``robust``.
        byzantine: f, of krum and multi-krum; None for other rules.
        clients: the N clients that were compared.
        distances: (N, N), ‖ΔWᵢ − ΔWⱼ‖ over the whole model, ΔW = s·B·A, in the order of ``clients``. Without a LoRA
            configuration s counts as 1.
        other_weight: what squares of tensors that are no LoRA factor (heads, biases, magnitudes) count in squared
            distances: 1, or less where they would outweigh the LoRA updates.
        scores: (N,), the clients' scores by Krum; None for other rules.
        weights: (N,), the weights in the average, summing to 1 but for ``kept``.
        refused: client → why it has no weight.
        bound: the norm that changes were clipped to; None without ``clip``.
        changes: (N,), the norms of the clients' changes; None without ``clip``.
        clipped: client → what is left of its change, between 0 and 1.
        kept: the share of the reference in the average, which clipping left to it.
    """

    rule: str
    byzantine: int | None
    clients: tuple[str, ...]
    distances: tuple[tuple[float, ...], ...]
    other_weight: float
    scores: tuple[float, ...] | None
    weights: tuple[float, ...]
    refused: dict[str, str]
    bound: float | None = None
    changes: tuple[float, ...] | None = None
    clipped: dict[str, float] | None = None
    kept: float = 0.0

    def lines(self) -> list[str]:
        """The choice in words, for the table of a report."""
        lines = []
        n = len(self.clients)
        if self.rule != "none":
            against = "" if self.byzantine is None else f" against {self.byzantine} attackers"
            lines.append(f"{self.rule}{against}: {n - len(self.refused)} of {n} clients count")
        if self.rule == "geometric-median":
            least = sorted(zip(self.weights, self.clients, strict=True))[: min(3, n)]
            lines.append("the smallest weights: " + ", ".join(f"{client} {weight:.2g}" for weight, client in least))
        lines += [f"refused {client}: {why}" for client, why in self.refused.items()]
        if self.bound is not None:
            lines.append(f"changes clipped to {self.bound:.4g}: {len(self.clipped or {})} of {n} clients")
            shown = list((self.clipped or {}).items())[:_SHOWN]
            lines += [f"clipped {client} to {left:.2g} of its change" for client, left in shown]
        if self.other_weight < 1:
            lines.append(f"heads and other tensors count {self.other_weight:.2g} in squared distances")
        return lines
