"""What a merge would lose, method by method and rank by rank, before anything is written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from fedrot_kernels import full_precision

from ..adapters.checks import own_scalings
from ..options import AggregationOptions
from .merge import MergeMethod, merge_planned
from .plan import MergePlan

TOLERATED = 0.05


@dataclass(frozen=True)
class MergePreview:
    """Relative errors ‖Σ wᵢsᵢBᵢAᵢ − merged‖_F / ‖Σ wᵢsᵢBᵢAᵢ‖_F of the whole model.

    Attributes:
        default: the largest rank of the adapters, which a merge takes in every module by default.
        exact: the largest sum of ranks, at which flexlora loses nothing.
        tolerated: the smallest rank of all modules at which flexlora loses at most 5 %.
        errors: method → rank → error; rank None stands for the largest of the adapters' in every module.
    """

    default: int
    exact: int
    tolerated: int
    errors: Mapping[str, Mapping[int | None, float]]

    def __str__(self) -> str:
        """The errors as a table."""
        methods = list(self.errors)
        lines = [
            "relative error of the merged update, by rank of every module",
            f"{'rank':<24}" + "".join(f"{method:>20}" for method in methods),
        ]
        for rank in dict.fromkeys(rank for errors in self.errors.values() for rank in errors):
            cells = [self.errors[method].get(rank) for method in methods]
            name = f"{self.default}, each module's own" if rank is None else str(rank)
            name += ", the sum of all" if rank == self.exact else ""
            lines.append(f"{name:<24}" + "".join(f"{'–':>20}" if x is None else f"{x:>20.4f}" for x in cells))
        lines.append(f"flexlora loses at most {TOLERATED:.0%} from rank {self.tolerated}, and nothing at rank {self.exact}")
        return "\n".join(lines)


def preview_merge(plan: MergePlan, *, reflections: bool = False) -> MergePreview:
    """Measure what a merge of each method would lose at several ranks.

    flexlora's errors are the singular values that a rank leaves out, at every rank; the other method is run, at ranks up to
    the adapters' own.

    Args:
        plan: the adapters.
        reflections: as in ``merge``.
    """
    spectra = _spectra(plan)
    norm = math.sqrt(sum(float(x.square().sum()) for x in spectra.values()))
    exact = max(map(len, spectra.values()))
    tails = torch.zeros(exact + 1, dtype=torch.float64)  # of the squares, from each rank on
    for x in spectra.values():
        tails[: len(x)] += x.square().flip(0).cumsum(0).flip(0)
    curve = [math.sqrt(max(float(square), 0.0)) / norm if norm else 0.0 for square in tails]
    default = max(a.rank for a in plan.layout.adapters)
    own = math.sqrt(sum(float(spectra[a.module][a.rank :].square().sum()) for a in plan.layout.adapters))
    ranks = sorted({2**i for i in range(exact.bit_length()) if 2**i < exact} | {exact})
    first, other = get_args(MergeMethod)
    errors: dict[str, dict[int | None, float]] = {first: {}, other: {}}
    for rank in [*(r for r in ranks if r < default), None, *(r for r in ranks if r >= default)]:
        errors[first][rank] = (own / norm if norm else 0.0) if rank is None else curve[rank]
        if rank is None or rank < default:
            options = AggregationOptions(method=other, reflections=reflections)
            errors[other][rank] = merge_planned(plan.at_rank(rank or 0), options, rank, None).report.relative_error or 0.0
    tolerated = next(rank for rank in range(1, exact + 1) if curve[rank] <= TOLERATED)
    return MergePreview(default, exact, tolerated, errors)


@full_precision
def _spectra(plan: MergePlan) -> dict[str, Tensor]:
    """module → the singular values of Σ wᵢsᵢBᵢAᵢ, as many as the ranks of all adapters sum to."""
    scalings = {adapter.name: own_scalings(adapter, plan.layout) for adapter in plan.adapters}
    spectra = {}
    for a in plan.layout.adapters:
        having = [x for x in plan.adapters if a.key_A in x.specs]
        A = torch.cat([x[a.key_A].detach().double().flatten(1) for x in having])
        B = [plan.weights[x.name] * scalings[x.name][a.module] * x[a.key_B].detach().double().flatten(1) for x in having]
        R_A, R_B = (torch.linalg.qr(F, mode="r").R for F in (A.mT, torch.cat(B, 1)))
        found = torch.linalg.svdvals(R_B @ R_A.mT).cpu()
        spectra[a.module] = torch.nn.functional.pad(found, (0, len(A) - len(found)))
    return spectra
