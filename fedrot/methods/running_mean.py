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
        sums: canonical key → sum, of factors as matrices: of A and B of the layout's groups in turn, then of the others.
            Every sum has storage of its own.
    """

    def __init__(self, layout: Layout, device: torch.device):
        self.layout = layout
        self.unit = self.total_weight = 0.0
        self.sums: dict[str, Tensor] = {}
        for group in layout.groups:
            first = group.adapters[0]
            dtype = working_dtype(first.dtype)
            A, B = (
                torch.zeros(s, dtype=dtype, device=device) for s in ((first.rank, first.d_in), (first.d_out, first.rank))
            )
            for a in group.adapters:  # zeros_like takes half the time of zeros
                self.sums[a.key_A], self.sums[a.key_B] = torch.zeros_like(A), torch.zeros_like(B)
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
        weight, share = self.count(weight)
        if weight == 0:
            return
        for g, group in enumerate(self.layout.groups):
            A, B, R = group.all_A(update), group.all_B(update), rotations[g] if rotations is not None else None
            sum_A, sum_B = group.all_A(self.sums), group.all_B(self.sums)
            sketches = add_client_(sum_A, sum_B, A, B, R, weight, sketch_seed=sketch_seed)
            if watch is not None and sketches is not None:
                watch(g, *sketches, R, share)
        for key in self.layout.other_keys:
            total, x = self.sums[key], update[key]
            total.add_(x if x.shape == total.shape else x.reshape(total.shape), alpha=weight)

    def count(self, weight: float) -> tuple[float, float]:
        """Count a client's weight, whose tensors are to be added.

        Returns:
            The weight in units, and its share in the weights so far.
        """
        if weight == 0:
            return 0.0, 0.0
        self._keep_in_range(weight)
        weight = weight / self.unit
        self.total_weight += weight
        return weight, weight / self.total_weight

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
            if self.total_weight:
                for total in self.sums.values():
                    total.mul_(self.unit / weight)
            self.total_weight *= self.unit / weight
            self.unit = weight

    def state_dict(self) -> dict[str, Tensor]:
        """The mean under canonical keys, in the updates' shapes and dtypes, in the memory of the sums where that will do."""
        mean = {}
        for key, total in self.sums.items():
            spec = self.layout.specs[key]
            mean[key] = total.div_(self.total_weight).to(spec.dtype).reshape(spec.shape)
        return mean


def shares_of(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights divided by their sum."""
    largest = max(weights)
    relative = [w / largest for w in weights]  # whose sum cannot overflow
    total = sum(relative)
    return tuple(w / total for w in relative)
