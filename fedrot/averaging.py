"""The weighted, rotated mean of updates, client by client: memory does not grow with their number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedrot_kernels import full_precision, rotate_add_

from .adapters import Layout
from .updates import StateDict

_LARGEST_WEIGHT = 2.0**40  # in units; the first client's weight is one


class RunningMean:
    """Σ wᵢ RᵢᵀAᵢ / Σ wᵢ and Σ wᵢ BᵢRᵢ / Σ wᵢ of every adapter, Σ wᵢ xᵢ / Σ wᵢ of every plain tensor.

    Sums are kept in float32 (float64 for float64) and rounded once, in ``state_dict``.
    """

    def __init__(self, layout: Layout, device: torch.device):
        self.layout = layout
        self.total_weight = 0.0
        self._unit = 0.0  # what weights are measured in, so that any magnitude fits the sums' dtype
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        for batch in layout.batches:
            first, G = batch.adapters[0], len(batch.adapters)
            dtype = _sum_dtype(first.dtype)
            A = torch.zeros(G, first.rank, first.d_in, dtype=dtype, device=device)
            B = torch.zeros(G, first.d_out, first.rank, dtype=dtype, device=device)
            self._batches.append((A, B))
            for i, a in enumerate(batch.adapters):
                self._sums[a.key_A], self._sums[a.key_B] = A[i], B[i]
        for key in layout.plain:
            spec = layout.specs[key]
            self._sums[key] = torch.zeros(spec.shape, dtype=_sum_dtype(spec.dtype), device=device)

    @full_precision
    def add(self, update: StateDict, weight: float, rotations: Sequence[Tensor] | None) -> None:
        """Add one client, already checked.

        Args:
            update: canonical key → tensor.
            weight: non-negative; only its ratio to the other weights matters.
            rotations: for every batch of the layout R (G, r, r), or None for no rotation.
        """
        if weight == 0:
            return
        self._keep_in_range(weight)
        weight = weight / self._unit
        self.total_weight += weight
        unrotated = tuple(self._sums) if rotations is None else self.layout.plain
        if rotations is not None:
            for batch, (A, B), R in zip(self.layout.batches, self._batches, rotations, strict=True):
                rotate_add_(A, batch.A(update), R, weight)
                rotate_add_(B.mT, batch.B(update).mT, R, weight)
        for key in unrotated:
            total, x = self._sums[key], update[key]
            total.add_(x if x.shape == total.shape else x.reshape(total.shape), alpha=weight)

    def _keep_in_range(self, weight: float) -> None:
        if weight > self._unit * _LARGEST_WEIGHT:
            for total in self._sums.values():
                total.mul_(self._unit / weight)
            self.total_weight *= self._unit / weight
            self._unit = weight

    def state_dict(self) -> dict[str, Tensor]:
        """The mean under canonical keys, in the updates' shapes and dtypes, every tensor with storage of its own."""
        mean = {}
        for key, spec in self.layout.specs.items():
            x = (self._sums[key] / self.total_weight).to(spec.dtype)
            mean[key] = x.reshape(spec.shape)
        return mean


def shares_of(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights, summing to 1."""
    largest = max(weights)
    relative = [w / largest for w in weights]  # whose sum cannot overflow
    total = sum(relative)
    return tuple(w / total for w in relative)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
