"""The weighted, rotated mean of updates, client by client, in memory that does not grow with their number."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedrot_kernels import add_client_, full_precision, working_dtype
from fedrot_kernels.tolerances import WEIGHT_RANGE

from ..adapters.layout import Layout
from ..adapters.update import StateDict

# Called with every group's index, the sketches of Bᵀ and A, rotations or None, and the client's share of the weights so far.
Watch = Callable[[int, Tensor, Tensor, Tensor | None, float], None]


class RunningMean:
    """The means Σ wᵢ RᵢᵀAᵢ / Σ wᵢ and Σ wᵢ BᵢRᵢ / Σ wᵢ of every adapter, and Σ wᵢ xᵢ / Σ wᵢ of every other tensor.

    Sums are kept in float32 (float64 for float64) and rounded once, in ``state_dict``.

    Args:
        layout: the layout of the updates.
        device: the device of the sums.

    Attributes:
        unit: the unit that weights are measured in, so that any magnitude fits the sums' dtype; 0 before the first client.
        total_weight: Σ wᵢ, in units.
        groups: for every group of the layout the sums Σ wᵢ RᵢᵀAᵢ (G, r, d_in) and Σ wᵢ BᵢRᵢ (G, d_out, r).
        sums: canonical key → sum; those of factors are matrices in the memory of ``groups``.
    """

    def __init__(self, layout: Layout, device: torch.device):
        self.layout = layout
        self.unit = self.total_weight = 0.0
        self.groups: list[tuple[Tensor, Tensor]] = []
        self.sums: dict[str, Tensor] = {}
        for group in layout.groups:
            first, G = group.adapters[0], len(group.adapters)
            dtype = working_dtype(first.dtype)
            A = torch.zeros(G, first.rank, first.d_in, dtype=dtype, device=device)
            B = torch.zeros(G, first.d_out, first.rank, dtype=dtype, device=device)
            self.groups.append((A, B))
            for i, a in enumerate(group.adapters):
                self.sums[a.key_A], self.sums[a.key_B] = A[i], B[i]
        for key in layout.other_keys:
            spec = layout.specs[key]
            self.sums[key] = torch.zeros(spec.shape, dtype=working_dtype(spec.dtype), device=device)

    @full_precision
    def add(
        self,
        update: StateDict,
        weight: float,
        rotations: Sequence[Tensor] | None,
        watch: Watch | None = None,
        sketch_seed: int | None = None,
    ) -> None:
        """Add one client that has been checked.

        Args:
            update: canonical key → tensor.
            weight: non-negative; only its ratio to the other weights matters.
            rotations: for every group of the layout R (G, r, r), or None for no rotation.
            watch: is called with the sketches of the client's factors of every group.
            sketch_seed: the seed of the sketches; None for none.
        """
        if weight == 0:
            return
        self._keep_in_range(weight)
        weight = weight / self.unit
        self.total_weight += weight
        for g, (group, (sum_A, sum_B)) in enumerate(zip(self.layout.groups, self.groups, strict=True)):
            A, B, R = group.all_A(update), group.all_B(update), rotations[g] if rotations is not None else None
            sketches = add_client_(sum_A, sum_B, A, B, R, weight, sketch_seed=sketch_seed)
            if watch is not None and sketches is not None:
                watch(g, *sketches, R, weight / self.total_weight)
        for key in self.layout.other_keys:
            total, x = self.sums[key], update[key]
            total.add_(x if x.shape == total.shape else x.reshape(total.shape), alpha=weight)

    @torch.no_grad()
    def merge(self, other: "RunningMean") -> float:
        """Add the clients of another mean of the same keys and shapes.

        Returns:
            The share of the other's clients in the weights of all.
        """
        if not other.total_weight:
            return 0.0
        self._keep_in_range(other.unit)
        scale = other.unit / self.unit
        for key, total in self.sums.items():
            total.add_(other.sums[key].to(total.device), alpha=scale)
        self.total_weight += other.total_weight * scale
        return other.total_weight * scale / self.total_weight

    def _keep_in_range(self, weight: float) -> None:
        """Take a weight as the unit if it is too large in units of the present one."""
        if weight > self.unit * WEIGHT_RANGE:
            for total in self.sums.values():
                total.mul_(self.unit / weight)
            self.total_weight *= self.unit / weight
            self.unit = weight

    def state_dict(self) -> dict[str, Tensor]:
        """The mean under canonical keys, in the updates' shapes and dtypes, every tensor with storage of its own."""
        mean = {}
        for key in self.sums:
            spec = self.layout.specs[key]
            x = (self.sums[key] / self.total_weight).to(spec.dtype)
            mean[key] = x.reshape(spec.shape)
        return mean


def shares_of(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights divided by their sum."""
    largest = max(weights)
    relative = [w / largest for w in weights]  # whose sum cannot overflow
    total = sum(relative)
    return tuple(w / total for w in relative)
