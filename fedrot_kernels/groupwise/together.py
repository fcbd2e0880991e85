"""Aligning the clients of a round together: rotations that depend on all of them."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from ..checks import check_adapters, check_strength, count_clients, firsts, normalize_weights
from ..dispatch import align_average, use_native
from ..grouping import group_indices
from ..native_backend.least_error import MOST_ROWS
from ..precision import full_precision, working_dtype
from ..stopping import CONSENSUS_SWEEPS, FIRST_SWEEPS
from ..tolerances import EQUAL_ERRORS, ERROR_ROUNDING, FACTOR_FLOOR, PREFERRED_STRENGTH, PRODUCT_FLOOR
from ..torch_backend.procrustes import rotations, soften
from ..torch_backend.products import relative_to_reference
from ..torch_backend.whole_model import weighted_average
from ..types import Aligned, Backend, Clients, Rotations, Target, Together
from .centred import Centred
from .compiled import native_consensus, native_least_error
from .consensus import consensus
from .gram import Grams, select
from .least_error import least_error_rotations

STRENGTHS = tuple(i / 10 for i in range(11))
_SWEEPS, _STEPS = 10, 6  # of a consensus and a descent that are soon reached
_ON = ("A", "B", "AB")
_ENTRIES = 1 << 24  # entries of Gram matrices, or of factors in float64, that are kept at a time: 128 MB


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
    reflections: bool = False,
    strength: float | None = 1.0,
    backend: Backend = "auto",
    sketch_seed: int | None = None,
) -> Together:
    """Align the clients' factors in Gram space and average them, all adapters of a model.

    One pass over the factors makes the Gram matrices (see ``gram``), and one more makes the averages. The work between them
    does not depend on the factors' length. PyTorch computes it in float64 on any device; for "error" the Gram matrices of
    factors of less precision are formed in float32, see ``centred``. Deterministic.

    For float32, bfloat16 and float16 factors on a CPU the compiled library finds the consensus, in float32 while the factors
    are in the cache, and the least error, by the same steps as PyTorch. PyTorch does adapters with ill-conditioned
    cross-covariances.

    Args:
        A: as in ``align_average``.
        B: as in ``align_average``.
        weights: as in ``align_average``.
        A_ref: per adapter (r, d_in). With the target "reference", clients are rotated towards the reference. With the others
            it fixes only the basis of the result, which is finally rotated towards it.
        B_ref: per adapter (d_out, r), likewise.
        target: "reference"; "consensus", see ``consensus``; or "error", see ``least_error``. "error" begins near the
            consensus or at the factors as they are given, whichever loses less, and ends no worse.
        on: the factors that count for "reference" and "consensus": "A", "B" or "AB".
        reflections: False for rotations, SO(r); True for O(r).
        strength: λ of ``soften``, in [0, 1]. None chooses it for every adapter: among 0, 0.1, …, 1 those whose predicted
            errors are within 1 % of the least, and of these the one nearest 0.5.
        backend: as in ``align_average``; read unless the target is "reference".
        sketch_seed: the seed by which the compiled library estimates errors; None for no estimates. PyTorch measures them.

    Raises:
        ValueError: shapes or weights that do not fit, by the adapter's index; or an option that does not exist.
        TypeError: tensors that are not floating-point.
    """
    check_adapters(A, B, A_ref, B_ref)
    choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (("target", target, get_args(Target)), ("on", on, _ON))
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if strength is not None:
        check_strength(strength)
    find = partial(_in_gram_space, target=target, on=on, reflections=reflections, strength=strength)
    # λ = 0, where all rotations are I, and a λ to be chosen are left to PyTorch.
    rank = max(x.shape[0] for x in firsts(A))
    native = target != "reference" and strength and use_native(backend, firsts(A), rank)
    options: Any = {"A_ref": A_ref, "B_ref": B_ref, "reflections": reflections, "strength": strength, "careful": find}
    if native and target == "consensus":
        return native_consensus(A, B, weights, **options, on=on, sketch_seed=sketch_seed)
    if native and (count_clients(A) + 2) * rank <= MOST_ROWS:
        return native_least_error(A, B, weights, **options)
    return find(A, B, weights, A_ref=A_ref, B_ref=B_ref)


def _in_gram_space(
    A: Sequence[Clients],
    B: Sequence[Clients],
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor],
    B_ref: Sequence[Tensor],
    target: Target,
    on: str,
    reflections: bool,
    strength: float | None,
) -> Together:
    """``align_together`` of checked inputs by PyTorch."""
    n = count_clients(A)
    shares = normalize_weights(weights, n, firsts(A)[0].device)
    R, measured = list(A_ref), torch.zeros(4, len(A), dtype=torch.float64, device=shares.device)
    undetermined = torch.zeros(len(A), n, dtype=torch.int64, device=shares.device)
    aligner = _Aligner(target, on, reflections, strength)
    near = None
    if target == "error" and any(working_dtype(x) == torch.float32 for x in firsts(A)):
        near = align_average(A, B, weights, A_ref=A_ref, B_ref=B_ref, reflections=reflections)
    for part in _parts(A, B, n + 1):
        frames = [[*A[i], A_ref[i].to(A[i][0].device)] for i in part], [[*B[i], B_ref[i].to(B[i][0].device)] for i in part]
        dtype = working_dtype(A[part[0]][0])
        sizes = [max(FACTOR_FLOOR[x.dtype] for x in (A[i][0], A_ref[i], B_ref[i])) for i in part]
        floors = torch.tensor(sizes, dtype=torch.float64, device="cpu")
        centred: tuple[Centred, Centred] | tuple[None, None] = (None, None)
        if near is not None and dtype == torch.float32:
            centred, floors = _centred(near, part), floors.clamp_min(PRODUCT_FLOOR[dtype])
        grams = Grams(*frames, torch.cat([shares, shares.new_zeros(1)]), aligner.uses, centred)
        found, left, *results = aligner(grams, floors)
        measured[:, part], undetermined[part] = torch.stack(results), left[:, :-1]
        for i, x in zip(part, found, strict=True):
            R[i] = x[:-1].to(dtype)
    eyes = [torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) for x in R]
    residual = torch.stack([(x.mT @ x - eye).abs().amax((1, 2)) for x, eye in zip(R, eyes, strict=True)])
    mean_A, mean_B, finite = weighted_average(A, B, [shares.to(x.dtype)[:, None, None] * x for x in R])
    counts = undetermined if target == "reference" else None
    strengths, error, norm, plain = measured
    return Together(mean_A, mean_B, R, residual, finite, strengths, error, norm, plain, counts)


class _Aligner:
    """The options of an alignment, applied to the Gram matrices of adapters of one rank.

    Attributes:
        uses: about how often a Gram matrix is multiplied, which decides whether to form it.
    """

    def __init__(self, target: Target, on: str, reflections: bool, strength: float | None):
        self.target, self.on, self.reflections, self.strength = target, on, reflections, strength
        self.uses = 5
        self.uses += _SWEEPS if target != "reference" else 0
        self.uses += 4 * _STEPS if target == "error" else 0
        self.uses += len(STRENGTHS) if strength is None else 0

    def __call__(self, grams: Grams, floor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Align; the last of the n clients is the reference, and the floors (G,) are those of ``rotations``.

        Returns:
            R (G, n, r, r); how many directions the rotation towards the reference leaves undetermined, (G, n); and λ, error,
            update norm and the plain average's error, each (G,).
        """
        eye = torch.eye(grams.A.r, dtype=torch.float64, device=grams.w.device).expand(len(grams.size), grams.A.n, -1, -1)
        plain = grams.at(eye).error
        R, _, undetermined = self._procrustes(self._towards_reference(grams, eye), floor)
        if self.target != "reference":
            on = "AB" if self.target == "error" else self.on
            sweeps = FIRST_SWEEPS if self.target == "error" else CONSENSUS_SWEEPS
            R = consensus(grams, R, reflections=self.reflections, floor=floor, on=on, sweeps=sweeps)
        if self.target == "error":
            R = select(grams.at(R).error < plain, R, eye)
            R = least_error_rotations(grams, R)
        if self.target != "reference":
            R = R @ self._procrustes(_mean_towards_reference(grams, R), floor).R[:, None]
        R, strength = self._soften(grams, R)
        error, norm, plain = ((x.clamp(min=0) * grams.size).sqrt() for x in (grams.at(R).error, grams.update, plain))
        return R, undetermined, strength, error, norm, plain

    def _procrustes(self, M: Tensor, floor: Tensor) -> Rotations:
        floors = floor.reshape(-1, *[1] * (M.dim() - 3)).expand(M.shape[:-2])
        return rotations(M, reflections=self.reflections, floor=floors)

    def _towards_reference(self, grams: Grams, eye: Tensor) -> Tensor:
        """FᵢF_refᵀ, (G, n, r, r).

        For the target "reference" it is the sum over the factors that count, each relative to the reference's norm. For the
        others it is only the beginning, and the sum over both factors, scaled to one size.
        """
        W = torch.zeros_like(eye)
        W[:, -1] = eye[:, -1]
        if self.target != "reference":
            return grams.A(W) + grams.B(W)
        M = torch.zeros_like(eye)
        for factor in self.on:
            products = getattr(grams, factor)
            M += relative_to_reference(products(W), products.squares[:, -1].reshape(-1, 1, 1, 1))
        return M

    def _soften(self, grams: Grams, R: Tensor) -> tuple[Tensor, Tensor]:
        """R_λ and λ (G,)."""
        if self.strength is not None:
            return soften(R, self.strength), torch.full_like(grams.size, self.strength)
        candidates = [soften(R, strength) for strength in STRENGTHS]
        errors = torch.stack([grams.at(X).error.clamp(min=0).sqrt() for X in candidates])
        grid = torch.tensor(STRENGTHS, dtype=torch.float64, device=R.device)[:, None]
        good = errors <= (1 + EQUAL_ERRORS) * errors.amin(0) + ERROR_ROUNDING * grams.update.clamp(min=0).sqrt()
        chosen = torch.where(good, (grid - PREFERRED_STRENGTH).abs(), torch.inf).argmin(0)
        return torch.stack(candidates)[chosen, torch.arange(len(R), device=R.device)], grid[chosen, 0]


def _mean_towards_reference(grams: Grams, R: Tensor) -> Tensor:
    """F̄F_refᵀ, (G, r, r)."""
    means = grams.at(R)
    return (means.P + means.Q)[:, -1].mT


def _centred(near: Aligned, part: list[int]) -> tuple[Centred, Centred]:
    """By what the Gram matrices of these adapters' clients and reference are formed."""
    R = torch.stack([near.R[i] for i in part])
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    # Cross-covariances that overflow float32 have no rotation. Any rotation and centre serve.
    R = torch.where(R.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), R, eye)
    R = torch.cat([R, eye.expand(len(part), 1, -1, -1)], dim=1)
    A, B = ([torch.nan_to_num(means[i], 0.0, 0.0, 0.0) for i in part] for means in (near.A, near.B))
    return Centred(R, A), Centred(R, [x.mT for x in B])


def _parts(A: Sequence[Clients], B: Sequence[Clients], n: int) -> Iterator[list[int]]:
    """Yield indices of adapters of one rank and dtype, as many at a time as memory is taken for."""
    for group in group_indices((clients[0].shape[0], clients[0].dtype) for clients in A):
        r = A[group[0]][0].shape[0]
        d = max(A[i][0].shape[1] + B[i][0].shape[0] for i in group)
        size = max(1, _ENTRIES // min(2 * (n * r) ** 2, n * r * d))
        yield from (group[i : i + size] for i in range(0, len(group), size))
