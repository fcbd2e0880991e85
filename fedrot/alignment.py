"""Rotating one client's factors towards a reference: what is aligned, how far, and in which group."""

from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from fedrot_kernels import NOISE, cross_covariance, full_precision, polar, rotate_add_, soften, special_orthogonal

from .adapters import Batch, Layout
from .errors import UpdateError
from .updates import StateDict, UpdateLike, not_finite, open_reference, open_update

AlignOn = Literal["A", "B", "alternate", "joint"]
RotationGroup = Literal["SO", "O"]


@dataclass(frozen=True)
class Alignment:
    """The options of FedRot-LoRA (arXiv 2602.23638).

    Attributes:
        align_on: the factor whose distance to the reference is made least: "A", "B", "alternate" (odd rounds A, even
            rounds B, as in the paper) or "joint" (the sum of both distances, each relative to its reference's norm).
        strength: λ in [0, 1]; 0 does not rotate (FedIT), 1 is the full Procrustes rotation.
        group: "SO" for rotations (det = +1, the paper's soft path) or "O" with reflections.
    """

    align_on: AlignOn = "alternate"
    strength: float = 0.5
    group: RotationGroup = "SO"

    def __post_init__(self) -> None:
        for name, value, allowed in (("align_on", self.align_on, AlignOn), ("group", self.group, RotationGroup)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")
        if not isinstance(self.strength, Real) or not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be between 0 (no rotation) and 1 (full rotation), got {self.strength!r}")

    def cross_covariance(self, batch: Batch, client: StateDict, reference: StateDict, round: int) -> Tensor:
        """M (G, r, r) of every adapter of a batch: A A_refᵀ, BᵀB_ref, or A A_refᵀ/‖A_ref‖² + BᵀB_ref/‖B_ref‖²."""
        on = ("B", "A")[round % 2] if self.align_on == "alternate" else self.align_on
        if on == "A":
            return cross_covariance(batch.A(client), batch.A(reference))
        if on == "B":
            return cross_covariance(batch.B(client).mT, batch.B(reference).mT)
        A_ref, B_ref = batch.A(reference), batch.B(reference)
        return _relative(cross_covariance(batch.A(client), A_ref), A_ref) + _relative(
            cross_covariance(batch.B(client).mT, B_ref.mT), B_ref
        )

    def rotation(self, M: Tensor) -> Tensor:
        """R (…, r, r): the polar factor of M, in the group, softened to the strength."""
        R = polar(M, noise=NOISE[M.dtype])
        if self.group == "SO":
            R = special_orthogonal(R, M)
        return soften(R, self.strength)


def check_rotations(R: Tensor, batch: Batch, client: str) -> None:
    """Raise UpdateError unless the rotations (G, r, r) of a client's adapters are finite."""
    if not bool(R.isfinite().all()):
        a = batch.adapters[int((~R.isfinite()).flatten(1).any(1).nonzero()[0])]
        raise UpdateError(f"{client}, {a.module}: the products of its factors overflow; send float64, or scale them")


def check_range(state_dict: StateDict, name: str) -> None:
    """Raise UpdateError if a result overflowed its dtype."""
    for key, x in state_dict.items():
        if not bool(x.isfinite().all()):
            raise UpdateError(f"{name} {key} {tuple(x.shape)} overflows {x.dtype}; send updates in a wider dtype")


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
    strength: float = 0.5,
    group: RotationGroup = "SO",
) -> dict[str, Tensor]:
    """One client's update, rotated towards the reference: for clients that rotate before they send.

    Averaging aligned updates plainly is ``aggregate`` with the same options, to the rounding of the dtype. Every B·A
    stays what it was, to the rounding of the dtype.

    Args:
        update: a PEFT state dict or folder.
        reference: the global adapter the client started from, likewise.
        align_on, round, strength, group: as in ``aggregate``.

    Returns:
        A state dict of the update's keys, shapes and dtypes; plain tensors (heads, biases, magnitudes) as they came.

    Raises:
        UpdateError: NaN or Inf in a factor, or a reference with other adapters.
    """
    alignment = Alignment(align_on, strength, group)
    client = open_update(update, "the update")
    layout = Layout(client.specs, client.name)
    target = open_reference(reference, client, layout)
    if found := not_finite(client):
        raise UpdateError(f"{client.name}, {found}")
    aligned = {client.keys_given[key]: client[key].detach() for key in client}
    if strength == 0:
        return aligned
    for batch in layout.batches:
        R = alignment.rotation(alignment.cross_covariance(batch, client, target, round))
        check_rotations(R, batch, client.name)
        A, B = batch.A(client), batch.B(client)
        A_aligned = rotate_add_(torch.zeros_like(A, dtype=R.dtype), A, R, 1.0)
        B_aligned = rotate_add_(torch.zeros_like(B, dtype=R.dtype).mT, B.mT, R, 1.0).mT
        for i, a in enumerate(batch.adapters):
            for key, factor in ((a.key_A, A_aligned[i]), (a.key_B, B_aligned[i])):
                spec = layout.specs[key]
                aligned[client.keys_given[key]] = factor.to(spec.dtype).reshape(spec.shape).clone()
    check_range(aligned, f"{client.name}, aligned,")
    return aligned
