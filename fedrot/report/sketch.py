"""A sketch that estimates the aggregation error of updates that are not kept, from random projections of each."""

import torch
from torch import Tensor

from fedrot_kernels import full_precision, working_dtype

from ..adapters.layout import Adapter, Layout
from ..seeding import generator

SIZE = 32  # k, the number of projections on either side
_STREAM = 0x5CE7C4  # keeps the sketch's random numbers apart from those that methods draw with the same seed


class Sketch:
    """The sketch ΨᵀEΩ (k, k) of every adapter's error E = Σ wᵢBᵢAᵢ − B̄Ā.

    Ψ (d_out, k) and Ω (d_in, k) are Gaussian, one of each per width. A client costs the products ΨᵀBᵢ (k, r) and AᵢΩ (r, k).
    It leaves its share of their means p̄ and q̄ and of Σ wᵢ (ΨᵀBᵢ − p̄)(AᵢΩ − q̄), which is ΨᵀEΩ by the identity
    E = Σ wᵢ (Bᵢ−B̄)(Aᵢ−Ā). Deviations from a running mean do not cancel, so that an error far smaller than the rounding of
    the update keeps its digits. The sums are float64.

    The mean square of the k² entries estimates ‖E‖² without bias. Its relative variance is 2(1 + (2k + 1) ρ)/k² with
    ρ = ‖E‖₄⁴/‖E‖_F⁴ in Schatten norms, which is 1 for rank one and 1/n for n equal singular values. At k = 32 that is the
    variance of 1024 independent projections for an E of high rank, and of 16 for one of rank one. One-sided projections
    would have half the variance for the same work, but keep d_out/k times as many sums.

    Clients who know the seed could send updates whose error the sketch does not see.

    Args:
        layout: the layout of the result.
        device: the device of the updates.
        seed: the seed of Ψ and Ω; sketches can be merged if they have one seed.
    """

    def __init__(self, layout: Layout, device: torch.device, seed: int):
        self.layout, self.seed = layout, seed
        self._projections: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._parts: list[dict[str, Tensor]] = []
        for group in layout.groups:
            G, a = len(group.adapters), group.adapters[0]
            shapes = {name: (G, *shape) for name, shape in part_shapes(a).items()}
            self._parts.append({n: torch.zeros(s, dtype=torch.float64, device=device) for n, s in shapes.items()})

    @full_precision
    def add(self, index: int, A: Tensor, B: Tensor, R: Tensor | None, share: float) -> None:
        """Add one client's factors of a group.

        Args:
            index: the group's place in the layout.
            A, B: (G, r, d_in) and (G, d_out, r).
            R: the client's rotations (G, r, r), or None.
            share: the client's part of the sum of all weights so far, its own among them.
        """
        right = A.to(dtype := working_dtype(A.dtype)) @ self._projection("A", A.shape[-1], dtype, A.device)
        left = (B.to(dtype).mT @ self._projection("B", B.shape[-2], dtype, B.device)).mT
        if R is not None:
            R = R.to(dtype)
            left, right = left @ R, R.mT @ right
        _merge(self._parts[index], {"left": left.double(), "right": right.double()}, share)

    def merge(self, parts: dict[str, dict[str, Tensor]], share: float) -> None:
        """Add the ``parts`` of another sketch; ``share`` is the part of its clients in the sum of all weights."""
        for group, mine in zip(self.layout.groups, self._parts, strict=True):
            theirs = {n: torch.stack([parts[a.key_A][n] for a in group.adapters]).to(x.device) for n, x in mine.items()}
            _merge(mine, theirs, share)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The sums of every adapter, key_A → p̄ ("left"), q̄ ("right") and ΨᵀEΩ ("lost"), in the memory of this sketch."""
        pairs = zip(self.layout.groups, self._parts, strict=True)
        return {a.key_A: {n: x[i] for n, x in of.items()} for group, of in pairs for i, a in enumerate(group.adapters)}

    def squares(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The squared projections of every adapter.

        Returns:
            key_A → a matrix (k, k) whose mean estimates ‖E‖², and one whose mean estimates ‖Σ wᵢBᵢAᵢ‖² − ‖B̄Ā‖², which is
            2⟨B̄Ā, E⟩ + ‖E‖²: the part of the norm that the mean factors do not give.
        """
        found = {}
        for key, x in self.parts().items():
            lost = x["lost"]
            found[key] = lost.square(), lost * (lost + 2 * x["left"] @ x["right"])
        return found

    def _projection(self, factor: str, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if (found := self._projections.get((factor, d, dtype))) is None:
            drawn = torch.randn(d, SIZE, generator=generator(self.seed, _STREAM, "AB".index(factor), d), dtype=torch.float64)
            found = self._projections[factor, d, dtype] = drawn.to(device, dtype)
        return found


def part_shapes(a: Adapter) -> dict[str, tuple[int, int]]:
    """The shapes of an adapter's sums, all float64."""
    return {"left": (SIZE, a.rank), "right": (a.rank, SIZE), "lost": (SIZE, SIZE)}


def mean_and_deviation(squares: Tensor) -> tuple[float, float]:
    """The mean of squared projections (k, k), and its standard deviation.

    The entries of a row share a projection, as do those of a column. A two-way analysis of variance therefore estimates the
    variance of the mean without bias, as (MS_rows + MS_columns − MS_residuals)/k².
    """
    k, mean = len(squares), squares.mean()
    rows, columns = squares.mean(1) - mean, squares.mean(0) - mean
    residuals = squares - mean - rows[:, None] - columns
    mean_squares = k * (rows.square().sum() + columns.square().sum()) / (k - 1)
    variance = (mean_squares - residuals.square().sum() / (k - 1) ** 2) / k**2
    return float(mean), float(variance.clamp(min=0).sqrt())


def _merge(mine: dict[str, Tensor], theirs: dict[str, Tensor], share: float) -> None:
    """Update means and the mean product of deviations pairwise; a single client has no deviations ("lost")."""
    left, right, lost = theirs["left"] - mine["left"], theirs["right"] - mine["right"], mine["lost"]
    lost.mul_(1 - share).baddbmm_(left, right, alpha=share * (1 - share))
    if "lost" in theirs:
        lost.add_(theirs["lost"], alpha=share)
    mine["left"].add_(left, alpha=share)
    mine["right"].add_(right, alpha=share)
