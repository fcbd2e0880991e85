"""A sketch that estimates the aggregation error of updates that are not kept."""

import torch
from torch import Tensor

from fedrot_kernels import Estimates, full_precision
from fedrot_kernels.sketch import SKETCH_SIZE, sum_and_deviation

from ..adapters.layout import Adapter, Layout

_SIDES = ("", "plain_")  # of the rotated factors, and of the factors as they came


class Sketch:
    """The sketch ΨᵀEΩ (k, k) of every adapter's error E = Σ wᵢBᵢAᵢ − B̄Ā, and of the error of the plain average.

    Ψ (d_out, k) and Ω (d_in, k) are count sketches, one of each per width; see ``fedrot_kernels.sketch``. A client costs the
    products ΨᵀBᵢ (k, r) and AᵢΩ (r, k). It leaves its share of their means p̄ and q̄ and of Σ wᵢ (ΨᵀBᵢ − p̄)(AᵢΩ − q̄), which is
    ΨᵀEΩ by the identity E = Σ wᵢ (Bᵢ−B̄)(Aᵢ−Ā). Deviations from a running mean do not cancel, so that an error far smaller
    than the rounding of the update keeps its digits. The sums are float64.

    The sum of the k² squared entries estimates ‖E‖² without bias. For projections of independent entries its relative
    variance is 2(1 + (2k + 1) ρ)/k² with ρ = ‖E‖₄⁴/‖E‖_F⁴ in Schatten norms, which is 1 for rank one and 1/n for n equal
    singular values. At k = 32 that is the variance of 1024 independent projections for an E of high rank, and of 16 for one
    of rank one.

    Clients who know the seed could send updates whose error the sketch does not see.

    Args:
        layout: the layout of the result.
        device: the device of the updates.
        seed: the seed of Ψ and Ω; sketches can be merged if they have one seed.
        rotates: whether clients may be rotated. Otherwise the plain average is the result, and both have the same sums.

    Attributes:
        sums: for every group of the layout (G, S, 64 r + 1024) with S = 2, or 1 without rotations: p̄ᵀ (r, k), q̄ (r, k) and
            ΨᵀEΩ (k, k) of the rotated factors, then those of the factors as they came.
    """

    def __init__(self, layout: Layout, device: torch.device, seed: int, *, rotates: bool = True):
        self.layout, self.seed = layout, seed
        self._sides = _SIDES if rotates else _SIDES[:1]
        self.sums: list[Tensor] = []
        self._parts: list[dict[str, Tensor]] = []
        for group in layout.groups:
            G, r, k = len(group.adapters), group.adapters[0].rank, SKETCH_SIZE
            sums = torch.zeros(G, len(self._sides), 2 * k * r + k * k, dtype=torch.float64, device=device)
            parts: dict[str, Tensor] = {}
            for side, name in enumerate(_SIDES):
                left, right, lost = sums[:, min(side, len(self._sides) - 1)].split((k * r, k * r, k * k), dim=1)
                parts |= {f"{name}left": left.view(G, r, k).mT, f"{name}right": right.view(G, r, k)}
                parts[f"{name}lost"] = lost.view(G, k, k)
            self.sums.append(sums)
            self._parts.append(parts)

    @full_precision
    def add(self, index: int, of_B: Tensor, of_A: Tensor, R: Tensor | None, share: float) -> None:
        """Add one client's factors of a group.

        Args:
            index: the group's place in the layout.
            of_B, of_A: (G, r, 32), the sketches of Bᵀ and of A.
            R: the client's rotations (G, r, r), or None.
            share: the client's part of the sum of all weights so far, its own among them.
        """
        left, right = of_B.double().mT, of_A.double()
        for side, turned in zip(self._sides, (R, None), strict=False):  # one side where no client may be rotated
            theirs = (left, right) if turned is None else (left @ turned.double(), turned.mT.double() @ right)
            _merge(self._parts[index], side, {side + "left": theirs[0], side + "right": theirs[1]}, share)

    def merge(self, parts: dict[str, dict[str, Tensor]], share: float) -> None:
        """Add the ``parts`` of another sketch; ``share`` is the part of its clients in the sum of all weights."""
        for group, mine in zip(self.layout.groups, self._parts, strict=True):
            theirs = {n: torch.stack([parts[a.key_A][n] for a in group.adapters]).to(x.device) for n, x in mine.items()}
            for side in self._sides:
                _merge(mine, side, theirs, share)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The sums of every adapter, key_A → name → sum, in the memory of this sketch; see ``part_shapes``."""
        pairs = zip(self.layout.groups, self._parts, strict=True)
        return {a.key_A: {n: x[i] for n, x in of.items()} for group, of in pairs for i, a in enumerate(group.adapters)}

    def estimates(self, mean_norms: dict[str, float]) -> Estimates:
        """The errors of all adapters, in the layout's order.

        Args:
            mean_norms: key_A → ‖B̄Ā‖_F of the mean factors.
        """
        parts = self.parts()
        keys = [key_A for key_A, _ in self.layout.factor_keys]
        lost, plain = (torch.stack([parts[key][side + "lost"] for key in keys]) for side in _SIDES)
        product = torch.stack([parts[key]["left"] @ parts[key]["right"] for key in keys])
        columns = [x for of in (lost.square(), plain.square(), lost * (lost + 2 * product)) for x in sum_and_deviation(of)]
        norms = torch.tensor([mean_norms[key] for key in keys], dtype=torch.float64, device="cpu").square()
        return Estimates(torch.stack([*(x.cpu() for x in columns), norms], dim=1), lost.square().sum(0).cpu())


def part_shapes(a: Adapter) -> dict[str, tuple[int, int]]:
    """The shapes of an adapter's float64 sums: p̄ ("left"), q̄ ("right"), ΨᵀEΩ ("lost"), and those of the plain average."""
    k = SKETCH_SIZE
    shapes = {"left": (k, a.rank), "right": (a.rank, k), "lost": (k, k)}
    return {side + name: shape for side in _SIDES for name, shape in shapes.items()}


def _merge(mine: dict[str, Tensor], side: str, theirs: dict[str, Tensor], share: float) -> None:
    """Update means and the mean product of deviations pairwise; a single client has no deviations ("lost")."""
    left_name, right_name, lost_name = (side + name for name in ("left", "right", "lost"))
    left, right, lost = theirs[left_name] - mine[left_name], theirs[right_name] - mine[right_name], mine[lost_name]
    lost.mul_(1 - share).baddbmm_(left, right, alpha=share * (1 - share))
    if lost_name in theirs:
        lost.add_(theirs[lost_name], alpha=share)
    mine[left_name].add_(left, alpha=share)
    mine[right_name].add_(right, alpha=share)
