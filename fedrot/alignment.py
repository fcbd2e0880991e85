"""What is aligned with what, how far, and in which group; and rotating one client's factors towards a reference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from fedrot_kernels import NOISE, cross_covariance, full_precision, procrustes, rotate_add_

from .adapters.checks import check_range, not_finite, open_reference
from .adapters.layout import Adapter, Batch, Layout
from .adapters.update import StateDict, Update, UpdateLike, open_update
from .errors import UpdateError
from .ranks.padding import own_rows, partial_isometries

Factor = Literal["A", "B"]


AlignOn = Literal["A", "B", "alternate", "joint", "error"]


RotationGroup = Literal["SO", "O", "GL"]


Strength = float | Literal["auto"]


# ‖RᵀR − I‖_max up to which a rotation counts as one; those that converge end a hundred times below.
LARGEST_RESIDUAL = 1e-4


@dataclass(frozen=True)
class Alignment:
    """The options of FedRot-LoRA (arXiv 2602.23638), and those beyond it.

    Attributes:
        align_on: the factor whose distance to the reference is made least: "A", "B", "alternate" (odd rounds A, even
            rounds B, as in the paper) or "joint" (the sum of both distances, each relative to its reference's norm); or
            "error": not a distance but the aggregation error itself.
        strength: λ in [0, 1]; 0 does not rotate (FedIT), 1 is the full Procrustes rotation; "auto" chooses it for every
            adapter by the error that it predicts. None becomes 0.5, and 1 with consensus or "error".
        group: "SO" for rotations (det = +1, the paper's soft path), "O" with reflections, or with "error" "GL": invertible
            matrices.
        consensus: clients are rotated towards each other, not towards a reference, by both factors unless ``align_on``
            is one of them.
    """

    align_on: AlignOn = "alternate"
    strength: Strength | None = None
    group: RotationGroup = "SO"
    consensus: bool = False

    def __post_init__(self) -> None:
        least_error = self.align_on == "error"
        if self.strength is None:
            object.__setattr__(self, "strength", 1.0 if self.consensus or least_error else 0.5)
        for name, value, allowed in (("align_on", self.align_on, AlignOn), ("group", self.group, RotationGroup)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")
        if self.strength != "auto" and (not isinstance(self.strength, Real) or not 0 <= self.strength <= 1):
            raise ValueError(
                f"strength must be between 0 (no rotation) and 1 (full rotation), or auto, got {self.strength!r}"
            )
        if self.strength == "auto" and least_error:
            raise ValueError(
                'strength="auto" looks for the least error, which align_on="error" has at 1: leave strength out'
            )
        if self.group == "GL" and not least_error:
            raise ValueError('group="GL" needs align_on="error": no invertible matrix is closest to a reference')
        if self.group == "GL" and self.strength not in (0, 1):
            raise ValueError(f"strength is {self.strength}, but there is no part of an invertible matrix: leave it out")

    @property
    def mutual(self) -> bool:
        """Whether one client's rotation depends on the others, so that all of a round are needed at once."""
        return self.consensus or self.align_on == "error" or self.strength == "auto"

    @property
    def fixed_strength(self) -> float:
        """λ, where it is a number."""
        assert isinstance(self.strength, Real)
        return float(self.strength)

    def factors(self, round: int) -> tuple[Factor, ...]:
        """The factors aligned in a round."""
        if self.align_on == "A" or self.align_on == "B":
            return (self.align_on,)
        if self.align_on == "alternate" and not self.consensus:
            return ("A",) if round % 2 else ("B",)
        return ("A", "B")

    def rotations(self, batch: Batch, client: Update, reference: StateDict, on: tuple[Factor, ...]) -> Tensor:
        """R (G, r, r) of one client's adapters of a batch.

        M is A A_refᵀ, BᵀB_ref or, aligned on both, A A_refᵀ/‖A_ref‖² + BᵀB_ref/‖B_ref‖².

        Raises:
            UpdateError: the products of the client's factors overflow.
        """
        frames = []
        if "A" in on:
            frames.append((batch.A(client), batch.A(reference)))
        if "B" in on:
            frames.append((batch.B(client).mT, batch.B(reference).mT))
        products = [cross_covariance(F, F_ref) for F, F_ref in frames]
        if len(on) > 1:
            products = [_relative(M, F_ref) for M, (_, F_ref) in zip(products, frames, strict=True)]
        M = products[0] if len(on) == 1 else products[0] + products[1]
        R, residual = procrustes(M, strength=self.fixed_strength, special=self.group == "SO", noise=NOISE[M.dtype])
        if client.ranks is not None:
            rows = torch.stack([own_rows(a, [client])[0] for a in batch.adapters]).to(R.device)
            padded = ~rows.all(1).squeeze(-1)
            R[padded], residual[padded] = partial_isometries(M[padded], rows[padded], self.fixed_strength)
        check_rotations(residual[:, None], batch.adapters, [client.name])
        return R


def check_single(alignment: Alignment) -> None:
    """Raise ValueError unless one client can align itself."""
    if alignment.mutual:
        what = 'align_on="error"' if alignment.align_on == "error" else 'strength="auto"'
        raise ValueError(f"{what} depends on the updates of all clients: the server aligns them, with aggregate(updates)")


def check_rotations(residual: Tensor, adapters: Sequence[Adapter], clients: Sequence[str]) -> None:
    """Raise UpdateError unless every rotation is one: residual (L, N) is ‖RᵀR − I‖_max of each."""
    wrong = ~(residual <= LARGEST_RESIDUAL)
    if bool(wrong.any()):
        client, adapter = (int(index[0]) for index in wrong.T.nonzero(as_tuple=True))
        where, far = f"{clients[client]}, {adapters[adapter].module}", float(residual[adapter, client])
        if math.isfinite(far):
            raise UpdateError(f"{where}: its rotation did not converge, ‖RᵀR − I‖_max is {far:.1e}; leave this client out")
        raise UpdateError(f"{where}: the products of its factors overflow; send float64, or scale them")


def _relative(M: Tensor, factor_ref: Tensor) -> Tensor:
    """M / ‖F_ref‖²; a reference that is zero says nothing, and M is zero with it."""
    squared = torch.linalg.matrix_norm(factor_ref.to(M.dtype), keepdim=True).square()
    return M / torch.where(squared == 0, 1, squared)


@full_precision
def align(
    update: UpdateLike,
    reference: UpdateLike,
    *,
    align_on: AlignOn = "alternate",
    round: int = 0,
    strength: Strength | None = None,
    group: RotationGroup = "SO",
) -> dict[str, Tensor]:
    """One client's update, rotated towards the reference: for clients that rotate before they send.

    Averaging aligned updates plainly is ``aggregate`` with the same options, to the rounding of the dtype. Every B·A
    stays what it was, to the rounding of the dtype.

    Args:
        update: a PEFT state dict or folder.
        reference: the global adapter the client started from, likewise.
        align_on, round, strength, group: as in ``aggregate``, but for "error", "auto" and "GL", which depend on all clients.

    Returns:
        A state dict of the update's keys, shapes and dtypes; plain tensors (heads, biases, magnitudes) as they came.

    Raises:
        UpdateError: NaN or Inf in a factor, or a reference with other adapters.
        ValueError: an alignment that one client cannot compute.
    """
    alignment = Alignment(align_on, strength, group)
    check_single(alignment)
    client = open_update(update, "the update")
    layout = Layout(client.specs, client.name)
    target = open_reference(reference, client, layout)
    if found := not_finite(client):
        raise UpdateError(f"{client.name}, {found}")
    aligned = {client.keys_given[key]: client[key].detach() for key in client}
    if alignment.strength == 0:
        return aligned
    for batch in layout.batches:
        R = alignment.rotations(batch, client, target, alignment.factors(round))
        A, B = batch.A(client), batch.B(client)
        A_aligned = rotate_add_(torch.zeros_like(A, dtype=R.dtype), A, R, 1.0)
        B_aligned = rotate_add_(torch.zeros_like(B, dtype=R.dtype).mT, B.mT, R, 1.0).mT
        for i, a in enumerate(batch.adapters):
            for key, factor in ((a.key_A, A_aligned[i]), (a.key_B, B_aligned[i])):
                spec = layout.specs[key]
                aligned[client.keys_given[key]] = factor.to(spec.dtype).reshape(spec.shape).clone()
    check_range(aligned, f"{client.name}, aligned,")
    return aligned
