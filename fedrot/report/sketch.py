"""The aggregation error of updates that are not kept, estimated from a few random projections of each."""

import torch
from torch import Tensor

from fedrot_kernels import full_precision

from ..adapters.layout import Adapter, Layout
from ..seeding import generator

SIZE = 32  # k
_STREAM = 0x5CE7C4  # apart from what methods draw with the same seed


class Sketch:
    """Of every adapter ΨᵀEΩ (k, k), E = Σ wᵢBᵢAᵢ − B̄Ā, with Gaussian Ψ (d_out, k) and Ω (d_in, k), one each per width.

    Every client costs the products ΨᵀBᵢ (k, r) and AᵢΩ (r, k), and leaves its share of their means p̄ and q̄ and of
    Σ wᵢ (ΨᵀBᵢ − p̄)(AᵢΩ − q̄), which is ΨᵀEΩ by the identity E = Σ wᵢ (Bᵢ−B̄)(Aᵢ−Ā). Deviations from a running mean
    do not cancel: an error far smaller than the rounding of the update keeps its digits. The sums are float64.

    The mean square of the k² entries, Z, estimates ‖E‖² without bias, with the relative variance
    2(1 + (2k + 1) ρ)/k², ρ = ‖E‖₄⁴/‖E‖_F⁴ (Schatten norms; 1 for rank one, 1/n for n equal singular values): at k = 32
    that of 1024 independent projections for an E of high rank, of 16 for one of rank one. One-sided projections of E would
    have half the variance for the same work, but keep d_out/k times as many sums.

    Clients who know the seed could send updates whose error it does not see.

    Args:
        layout: of the updates.
        device: theirs.
        seed: of Ψ and Ω; sketches can be merged if they have it in common.
    """

    def __init__(self, layout: Layout, device: torch.device, seed: int):
        self.layout, self.seed = layout, seed
        self._projections: dict[tuple, Tensor] = {}
        self._parts: list[dict[str, Tensor]] = []
        for group in layout.groups:
            G, a = len(group.adapters), group.adapters[0]
            shapes = {name: (G, *shape) for name, shape in part_shapes(a).items()}
            self._parts.append({n: torch.zeros(s, dtype=torch.float64, device=device) for n, s in shapes.items()})

    @full_precision
    def add(self, index: int, A: Tensor, B: Tensor, R: Tensor | None, share: float) -> None:
        """Add one client's factors of a group.

        Args:
            index: of the layout's group.
            A, B: (G, r, d_in) and (G, d_out, r).
            R: its rotations (G, r, r), or None.
            share: of the weights so far, its own among them, that is its own.
        """
        right = A.to(dtype := _working(A.dtype)) @ self._projection("A", A.shape[-1], dtype, A.device)
        left = (B.to(dtype).mT @ self._projection("B", B.shape[-2], dtype, B.device)).mT
        if R is not None:
            left, right = left @ R, R.mT @ right
        _merge(self._parts[index], {"left": left.double(), "right": right.double()}, share)

    def merge(self, parts: dict[str, dict[str, Tensor]], share: float) -> None:
        """Add what ``parts`` of another sketch are; share as in ``add``, of all its clients."""
        for group, mine in zip(self.layout.groups, self._parts, strict=True):
            theirs = {n: torch.stack([parts[a.key_A][n] for a in group.adapters]).to(x.device) for n, x in mine.items()}
            _merge(mine, theirs, share)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """key_A → p̄ ("left"), q̄ ("right") and ΨᵀEΩ ("lost"), in the memory of this sketch."""
        pairs = zip(self.layout.groups, self._parts, strict=True)
        return {a.key_A: {n: x[i] for n, x in of.items()} for group, of in pairs for i, a in enumerate(group.adapters)}

    def squares(self) -> dict[str, tuple[Tensor, Tensor]]:
        """key_A → (k, k) whose mean estimates ‖E‖², and (k, k) whose mean estimates ‖Σ wᵢBᵢAᵢ‖² − ‖B̄Ā‖².

        The latter is 2⟨B̄Ā, E⟩ + ‖E‖²: of the norm only what the mean factors do not tell.
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
    """What a sketch keeps of an adapter, all float64."""
    return {"left": (SIZE, a.rank), "right": (a.rank, SIZE), "lost": (SIZE, SIZE)}


def mean_and_deviation(squares: Tensor) -> tuple[float, float]:
    """The mean of (k, k) squared projections, and its standard deviation.

    Entries of a row share a projection, as do those of a column: with the mean squares of rows, columns and residuals of a
    two-way analysis of variance, the variance of the mean is (MS_rows + MS_columns − MS_residuals)/k², without bias.
    """
    k, mean = len(squares), squares.mean()
    rows, columns = squares.mean(1) - mean, squares.mean(0) - mean
    residuals = squares - mean - rows[:, None] - columns
    of_means = k * (rows.square().sum() + columns.square().sum()) / (k - 1)
    variance = (of_means - residuals.square().sum() / (k - 1) ** 2) / k**2
    return float(mean), float(variance.clamp(min=0).sqrt())


def _merge(mine: dict[str, Tensor], theirs: dict[str, Tensor], share: float) -> None:
    """Pairwise update of means and of the mean product of deviations; one client alone has none ("lost")."""
    left, right, lost = theirs["left"] - mine["left"], theirs["right"] - mine["right"], mine["lost"]
    lost.mul_(1 - share).baddbmm_(left, right, alpha=share * (1 - share))
    if "lost" in theirs:
        lost.add_(theirs["lost"], alpha=share)
    mine["left"].add_(left, alpha=share)
    mine["right"].add_(right, alpha=share)


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
