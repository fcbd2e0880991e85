"""Sketches of factors, by which the aggregation error is estimated for a fraction of its cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256

import torch
from torch import Tensor

from .checks import normalize_weights
from .grouping import group_indices
from .measures import product_norm
from .precision import full_precision, working_dtype
from .types import Clients, Estimates

SKETCH_SIZE = 32  # k, the number of buckets on either side
_QUAD = 4  # neighbouring dimensions that share a sign and stay neighbours


@dataclass(frozen=True)
class Projection:
    """A count sketch Ω (d, 32): dimension c = 32 b + j adds to bucket j ⊕ 4 m_b with the sign of its quad ⌊c/4⌋.

    Attributes:
        d: the number of dimensions.
        shifts: m_b of every block of 32 dimensions, uint8, from 0 to 7.
        quads: the sign of every quad, float32, 8 per block.
        buckets: the signs of a block's dimensions in the order of their buckets, float32, 32 per block.
    """

    d: int
    shifts: Tensor
    quads: Tensor
    buckets: Tensor

    @cached_property
    def matrix(self) -> Tensor:
        """Ω in float64; one entry ±1 a row."""
        signs = self.quads.view(len(self.shifts), -1).repeat_interleave(_QUAD, dim=1)
        matrix = torch.zeros(len(signs), SKETCH_SIZE, SKETCH_SIZE, dtype=torch.float32, device="cpu")
        matrix.scatter_(2, _places(self.shifts)[:, :, None], signs[:, :, None])
        return matrix.flatten(0, 1)[: self.d].double()


@lru_cache(maxsize=256)
def projection(seed: int, factor: str, d: int) -> Projection:
    """Draw the projection of one factor, "A" or "B", of width d; the same for the same arguments."""
    state = int.from_bytes(sha256(f"{seed} {factor} {d}".encode()).digest()[:8], "little") >> 1
    generator, blocks = torch.Generator("cpu").manual_seed(state), -(-d // SKETCH_SIZE)
    shifts = torch.randint(SKETCH_SIZE // _QUAD, (blocks,), generator=generator, dtype=torch.uint8, device="cpu")
    quads = 2 * torch.randint(2, (blocks, SKETCH_SIZE // _QUAD), generator=generator, device="cpu").float() - 1
    signs = quads.repeat_interleave(_QUAD, dim=1)
    # XOR is its own inverse: bucket j holds dimension j ⊕ 4 m.
    return Projection(d, shifts, quads.flatten(), signs.gather(1, _places(shifts)).flatten())


def _places(shifts: Tensor) -> Tensor:
    """The bucket of every dimension of every block, (blocks, 32)."""
    return torch.arange(SKETCH_SIZE, device="cpu") ^ (_QUAD * shifts.long()[:, None])


@full_precision
def sketch(F: Tensor, factor: str, seed: int) -> Tensor:
    """FΩ (..., r, 32) of frames F (..., r, d): A, or B.mT, which is the factor "B". In F's working precision."""
    dtype = working_dtype(F)
    found: Tensor = F.to(dtype) @ projection(seed, factor, F.shape[-1]).matrix.to(F.device, dtype)
    return found


@full_precision
def estimate_errors(
    A: Sequence[Clients],
    B: Sequence[Clients],
    R: Sequence[Tensor] | None,
    weights: Sequence[float] | Tensor,
    mean_A: Sequence[Tensor],
    mean_B: Sequence[Tensor],
    seed: int,
) -> Estimates:
    """Estimate the errors of L adapters from N clients. One synchronisation with a device.

    Args:
        A, B, weights: as in ``dispatch.align_average``.
        R: per adapter the rotations (N, r, r), or None if nothing was rotated.
        mean_A, mean_B: per adapter the averages of the rotated factors.
        seed: the seed of the projections.
    """
    shares = normalize_weights(weights, len(A[0]), A[0][0].device)
    numbers = torch.empty(len(A), 7, dtype=torch.float64, device=shares.device)
    squares = torch.zeros(SKETCH_SIZE, SKETCH_SIZE, dtype=torch.float64, device=shares.device)
    shapes = [(a[0].shape, b[0].shape, a[0].dtype) for a, b in zip(A, B, strict=True)]
    for group in group_indices(shapes):
        left = torch.stack([sketch(_stacked(B[i]).mT, "B", seed) for i in group])
        right = torch.stack([sketch(_stacked(A[i]), "A", seed) for i in group])
        rotations = None if R is None else torch.stack([R[i] for i in group])
        means = (torch.stack([mean[i].double() for i in group]) for mean in (mean_B, mean_A))
        numbers[group], lost = _estimate(left, right, rotations, shares, product_norm(*means))
        squares += lost.square().sum(0)
    return Estimates(numbers.cpu(), squares.cpu())


def _stacked(clients: Clients) -> Tensor:
    return clients if isinstance(clients, Tensor) else torch.stack(list(clients))


def _estimate(left: Tensor, right: Tensor, R: Tensor | None, shares: Tensor, mean_norm: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers (G, 7) of adapters of one shape, and the sketches of their errors (G, 32, 32).

    Args:
        left, right: (G, N, r, 32), the sketches of Bᵀ and of A.
        R: (G, N, r, r) or None.
        shares: (N,), summing to 1.
        mean_norm: (G,), ‖B̄Ā‖_F.
    """
    shares, found = shares.to(left.dtype), []
    for turned in ([] if R is None else [R.to(left.dtype)]) + [None]:
        (on_B, mean_B), (on_A, mean_A) = (_centre(x if turned is None else turned.mT @ x, shares) for x in (left, right))
        lost = torch.einsum("n,gnrb,gnrc->gbc", shares, on_B, on_A).double()
        found.append((lost, mean_B.mT.double() @ mean_A.double()))
    (lost, product), (plain, _) = found[0], found[-1]
    parts = [sum_and_deviation(x) for x in (lost.square(), plain.square(), lost * (lost + 2 * product))]
    return torch.stack([*(x for pair in parts for x in pair), mean_norm.double().square()], dim=1), lost


def _centre(S: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The deviations of sketches (G, N, r, 32) from their weighted mean, zero for equal ones, and the mean."""
    mean = S[:, 0] + torch.einsum("n,gnrb->grb", shares, S - S[:, :1])
    return S - mean[:, None], mean


def sum_and_deviation(values: Tensor) -> tuple[Tensor, Tensor]:
    """The sums (...) of values (..., 32, 32) of sketches, and their standard deviations.

    Values of a row share a bucket of Ψ, and those of a column one of Ω. A two-way analysis of variance therefore estimates
    the variance of their mean, as (MS_rows + MS_columns − MS_residuals)/k². It takes buckets to be drawn alike. Where the
    error lies in few dimensions some buckets hold more than others, and the estimate is too large. It is at least half
    of what independent values have, because the difference can be negative.
    """
    mean = values.mean((-2, -1))
    rows, columns = values.mean(-1) - mean[..., None], values.mean(-2) - mean[..., None]
    residuals = values - mean[..., None, None] - rows[..., :, None] - columns[..., None, :]
    between = SKETCH_SIZE * (rows.square().sum(-1) + columns.square().sum(-1)) / (SKETCH_SIZE - 1)
    within = residuals.square().sum((-2, -1)) / (SKETCH_SIZE - 1) ** 2
    return SKETCH_SIZE**2 * mean, SKETCH_SIZE * torch.maximum(between - within, within / 2).sqrt()
