"""Alignment and averaging of a whole model in one call, adapter by adapter while its factors are in the cache."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..checks import count_clients, normalize_weights, relative_weights
from ..torch_backend.exact import ExactProducts
from ..torch_backend.procrustes import rotations
from ..types import Aligned, Clients
from .call import Call, floats, no_estimates


def align_average(
    A: Sequence[Clients],
    B: Sequence[Clients],
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor] | None,
    B_ref: Sequence[Tensor] | None,
    strength: float,
    reflections: bool,
    sketch_seed: int | None = None,
    fields: Mapping[str, int | Tensor] | None = None,
    instructions: str | None = None,
) -> Aligned:
    """Align and average checked factors on a CPU; see ``dispatch.align_average``.

    Args:
        A, B, weights, A_ref, B_ref, strength, reflections, sketch_seed: as there; without a reference nothing is rotated.
        fields: more fields of the call, by which clients are aligned to each other, and their mean to both references.
        instructions: the instruction set, at most what the machine has; by default that.
    """
    call, L, n = Call(A, B, instructions), len(A), count_clients(A)
    mean_A, mean_B = (
        [torch.empty_like(x, memory_format=torch.contiguous_format) for x in firsts]
        for firsts in (call.first_A, call.first_B)
    )
    finite = torch.ones(L, dtype=torch.uint8, device="cpu")
    shares = normalize_weights(weights, n, torch.device("cpu")).float()
    relative, total = relative_weights(weights, n)
    call.set(A_out=mean_A, B_out=mean_B, finite=finite)
    call.set(shares=shares, weights=torch.tensor(relative, dtype=torch.float32, device="cpu"), total=total)
    estimates = None
    if sketch_seed is not None:
        estimates = no_estimates(L)
        call.sketch(sketch_seed)
        call.set(estimates=estimates.numbers, squares=estimates.squares)
    call.set(**fields or {})
    search = Search(call, A, B, A_ref, B_ref, strength, reflections)
    search.run()
    return Aligned(mean_A, mean_B, search.R, search.residual, search.undetermined, finite.all(), estimates, search.angles)


class Search:
    """The rotations that a call finds; those that Newton–Schulz does not are found from exact products.

    Args:
        call: the call, whose other fields are set.
        A, B, A_ref, B_ref, strength, reflections: as in ``align_average``; without a reference there are no rotations.

    Attributes:
        R: per adapter (N, r, r).
        residual, undetermined, angles: (L, N), as in ``Aligned``.
    """

    def __init__(
        self,
        call: Call,
        A: Sequence[Clients],
        B: Sequence[Clients],
        A_ref: Sequence[Tensor] | None,
        B_ref: Sequence[Tensor] | None,
        strength: float,
        reflections: bool,
    ):
        L, n = len(A), count_clients(A)
        self._call, self._strength, self._reflections = call, strength, reflections
        self.R: list[Tensor] = []
        self.residual, self.undetermined = floats(L, n), torch.zeros(L, n, dtype=torch.int64, device="cpu")
        self.angles: Tensor | None = None
        self._doubtful = torch.zeros(L, n, dtype=torch.uint8, device="cpu")
        if A_ref is None and B_ref is None:
            return
        self._factors = A, B, A_ref, B_ref
        self.R, self.angles = _rotations(n, call.ranks), torch.zeros(L, n, dtype=torch.float64, device="cpu")
        call.refer_to(A_ref, B_ref)
        call.set(
            strength=strength,
            reflections=reflections,
            R=self.R,
            residual=self.residual,
            undetermined=self.undetermined,
            doubtful=self._doubtful,
            angles=self.angles,
        )

    def run(self) -> None:
        """Make the call."""
        self._call.run(self._careful)

    @cached_property
    def _exact(self) -> ExactProducts:
        return ExactProducts(*self._factors)

    def _careful(self, adapter: int) -> None:
        clients = self._doubtful[adapter].nonzero().squeeze(-1)
        M = torch.stack([self._exact(adapter, i) for i in clients.tolist()])
        floor = self._exact.floors[adapter]
        found = rotations(M, strength=self._strength, reflections=self._reflections, floor=floor)
        self.R[adapter][clients] = found.R.float()
        self.residual[adapter, clients] = found.residual.float()
        self.undetermined[adapter, clients] = found.undetermined


def _rotations(n: int, ranks: Sequence[int]) -> list[Tensor]:
    """Memory for the rotations of n clients, (n, r, r) per adapter."""
    if len(set(ranks)) == 1:
        return list(floats(len(ranks), n, ranks[0], ranks[0]).unbind())
    sizes = [n * r * r for r in ranks]
    return [x.view(n, r, r) for x, r in zip(floats(sum(sizes)).split(sizes), ranks, strict=True)]
