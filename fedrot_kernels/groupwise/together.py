"""Aligning clients to each other: rotations, or invertible matrices, that depend on all clients of a round."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..checks import check_adapters, normalised
from ..dispatch import Clients
from ..precision import full_precision
from ..torch_backend.procrustes import NOISE, procrustes, soften
from ..torch_backend.whole_model import transform_average
from .consensus import STEPS as CONSENSUS_STEPS
from .consensus import consensus
from .gram import Grams, select
from .least_error import MATRIX_STEPS, ROTATION_STEPS, least_error_matrices, least_error_rotations

Target = Literal["reference", "consensus", "error"]
Group = Literal["SO", "O", "GL"]

_ON = ("A", "B", "AB")
STRENGTHS = tuple(i / 10 for i in range(11))
# Predicted errors that differ by less are as good as each other: relative to the least, and to the update, whose square
# rounds to 1e-16 of itself.
_AS_GOOD, _ROUNDING = 0.01, 1e-7
_ENTRIES = 1 << 24  # of Gram matrices, or factors in float64, that are kept at a time: 128 MB


@dataclass(frozen=True)
class Together:
    """Averages of L adapters from N clients that were aligned to each other.

    Attributes:
        A, B: per adapter Ā = Σ wᵢHᵢAᵢ (r, d_in) and B̄ = Σ wᵢBᵢGᵢ (d_out, r), the inputs' dtype.
        G, H: per adapter (N, r, r), float32 (float64 for float64 inputs); for rotations H = Gᵀ.
        residual: (L, N), ‖HG − I‖_max; NaN where products of the factors were not finite.
        finite: a bool scalar tensor: every entry of every mean is finite.
        strengths: (L,) float64, λ.
        error, update_norm: (L,) float64, ‖Σ wᵢBᵢAᵢ − B̄Ā‖_F before Ā and B̄ are rounded, and ‖Σ wᵢBᵢAᵢ‖_F.
    """

    A: list[Tensor]
    B: list[Tensor]
    G: list[Tensor]
    H: list[Tensor]
    residual: Tensor
    finite: Tensor
    strengths: Tensor
    error: Tensor
    update_norm: Tensor


@full_precision
def align_together(
    A: Sequence[Clients],
    B: Sequence[Clients],
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor],
    B_ref: Sequence[Tensor],
    target: Target = "error",
    on: str = "AB",
    group: Group = "SO",
    strength: float | None = 1.0,
    prior: Sequence[float] | None = None,
) -> Together:
    """Align the clients' factors in Gram space and average them, all adapters of a model.

    One pass over the factors makes the Gram matrices (see ``gram``), one more the averages; what lies between does not
    depend on their length. Computed by PyTorch in float64 on any device. Deterministic.

    Args:
        A, B, weights: as in ``align_average``.
        A_ref, B_ref: per adapter (r, d_in) and (d_out, r). With the target "reference" clients are rotated towards it; else
            it fixes the basis of the result only, which is finally rotated towards it.
        target: "reference", "consensus" (see ``consensus``), or "error" (see ``least_error``), which begins at the consensus
            or at the factors as they came, whichever loses less, and ends no worse.
        on: the factors that count for the first two, "A", "B" or "AB".
        group: "SO", "O", or with the target "error" "GL", invertible matrices.
        strength: λ of ``soften``, not of GL; None chooses it for every adapter, among 0, 0.1, …, 1 the one of least error.
        prior: per adapter the λ to prefer among those whose errors differ by no more than 1 %; 0.5 if not given.

    Raises:
        ValueError: shapes or weights that do not fit, by the adapter's index, or options that do not go together.
        TypeError: tensors that are not floating-point.
    """
    n = check_adapters(A, B, A_ref, B_ref)
    for name, value, allowed in (("target", target, get_args(Target)), ("group", group, get_args(Group)), ("on", on, _ON)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if prior is not None and len(prior) != len(A):
        raise ValueError(f"prior has {len(prior)} entries for {len(A)} adapters; pass one each")
    if group == "GL" and (target != "error" or strength != 1):
        raise ValueError('group "GL" goes with target "error" and strength 1: there is no part of an invertible matrix')
    if strength is not None and not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, or None to choose it, got {strength}")
    shares = normalised(weights, n, A[0][0].device)
    G, H, numbers = list(A_ref), list(A_ref), torch.zeros(3, len(A), dtype=torch.float64, device=shares.device)
    aligner = _Aligner(target, on, group, strength)
    for part in _parts(A, B, n + 1, aligner.uses):
        frames = [[*A[i], A_ref[i].to(A[i][0].device)] for i in part], [[*B[i], B_ref[i].to(B[i][0].device)] for i in part]
        grams = Grams(*frames, torch.cat([shares, shares.new_zeros(1)]), aligner.uses)
        of_prior = torch.tensor([prior[i] if prior else 0.5 for i in part], dtype=torch.float64, device=shares.device)
        of_part = aligner(grams, NOISE[_working(A[part[0]][0].dtype)], of_prior)
        numbers[:, part] = torch.stack(of_part[2:])
        for i, *matrices in zip(part, *of_part[:2], strict=True):
            G[i], H[i] = (x[:-1].to(_working(A[i][0].dtype)) for x in matrices)
    eyes = [torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) for x in G]
    residual = torch.stack([(h @ g - eye).abs().amax((1, 2)) for g, h, eye in zip(G, H, eyes, strict=True)])
    W_A, W_B = ([shares.to(x.dtype)[:, None, None] * x for x in side] for side in ([h.mT for h in H], G))
    mean_A, mean_B, finite = transform_average(A, B, W_A, W_B)
    return Together(mean_A, mean_B, G, H, residual, finite, *numbers)


class _Aligner:
    """Matrices for adapters of one rank: the options, applied to their Gram matrices."""

    def __init__(self, target: Target, on: str, group: Group, strength: float | None):
        self.target, self.on, self.group, self.strength = target, on, group, strength
        # How often a Gram matrix is multiplied: what decides whether to form it.
        self.uses = 4
        self.uses += CONSENSUS_STEPS if target != "reference" else 0
        if target == "error":
            self.uses += 2 * (MATRIX_STEPS if group == "GL" else ROTATION_STEPS)
        self.uses += len(STRENGTHS) if strength is None else 0

    def __call__(self, grams: Grams, noise: float, prior: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """G, H (G, n, r, r), and λ, error and update norm (G,); the last client is the reference."""
        special = self.group != "O"
        eye = torch.eye(grams.A.r, dtype=torch.float64, device=grams.w.device).expand(len(grams.size), grams.A.n, -1, -1)
        R, _ = procrustes(self._towards_reference(grams, eye), special=special, noise=noise)
        if self.target != "reference":
            R = consensus(grams, R, special=special, noise=noise, on="AB" if self.target == "error" else self.on)
        H = None
        if self.target == "error":
            R = select(grams.at(R, R.mT).error < grams.at(eye, eye).error, R, eye)
            if self.group == "GL":
                R, H = least_error_matrices(grams, R)
            else:
                R = least_error_rotations(grams, R)
        if self.target != "reference":
            M = self._mean_towards_reference(grams, R, R.mT if H is None else H)
            Q = procrustes(M, special=special, noise=noise)[0][:, None]
            R = R @ Q
            H = None if H is None else Q.mT @ H
        if H is not None:
            strength = torch.ones_like(prior)
        else:
            R, strength = self._softened(grams, R, prior)
            H = R.mT
        error = grams.at(R, H).error.clamp(min=0) * grams.size
        return R, H, strength, error.sqrt(), (grams.update.clamp(min=0) * grams.size).sqrt()

    def _towards_reference(self, grams: Grams, eye: Tensor) -> Tensor:
        """(G, n, r, r), FᵢF_refᵀ: where that is the target, of the factors that count, each relative to the reference's, of
        which one that is zero says nothing; where it is but the beginning, of both, scaled to one size."""
        W = torch.zeros_like(eye)
        W[:, -1] = eye[:, -1]
        if self.target != "reference":
            return grams.A(W) + grams.B(W)
        M = torch.zeros_like(eye)
        for factor in self.on:
            products = getattr(grams, factor)
            squared = products.squares[:, -1].reshape(-1, 1, 1, 1)
            M += products(W) / torch.where(squared == 0, 1, squared)
        return M

    @staticmethod
    def _mean_towards_reference(grams: Grams, G: Tensor, H: Tensor) -> Tensor:
        """(G, r, r), F̄F_refᵀ."""
        means = grams.at(G, H)
        return (means.P + means.Q)[:, -1].mT

    def _softened(self, grams: Grams, R: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """R_λ and λ (G,)."""
        if self.strength is not None:
            return soften(R, self.strength), torch.full_like(prior, self.strength)
        candidates = [soften(R, strength) for strength in STRENGTHS]
        errors = torch.stack([grams.at(X, X.mT).error.clamp(min=0).sqrt() for X in candidates])
        grid = torch.tensor(STRENGTHS, dtype=torch.float64, device=R.device)[:, None]
        good = errors <= (1 + _AS_GOOD) * errors.amin(0) + _ROUNDING * grams.update.clamp(min=0).sqrt()
        chosen = torch.where(good, (grid - prior).abs(), torch.inf).argmin(0)
        return torch.stack(candidates)[chosen, torch.arange(len(R), device=R.device)], grid[chosen, 0]


def _parts(A: Sequence[Clients], B: Sequence[Clients], n: int, uses: int) -> Iterator[list[int]]:
    """Indices of adapters of one rank and dtype, as many at a time as memory is taken for."""
    groups: dict[tuple, list[int]] = {}
    for i, of_clients in enumerate(A):
        groups.setdefault((of_clients[0].shape[0], of_clients[0].dtype), []).append(i)
    for (r, _), group in groups.items():
        d = max(A[i][0].shape[1] + B[i][0].shape[0] for i in group)
        size = max(1, _ENTRIES // min(2 * (n * r) ** 2, n * r * d))
        yield from (group[i : i + size] for i in range(0, len(group), size))


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
