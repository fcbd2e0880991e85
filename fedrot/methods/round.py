"""What goes into a method and what comes out: the updates of one round, and their averages."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedrot_kernels import Estimates, Factors

from ..adapters.layout import Layout
from ..adapters.update import Update
from ..ranks.scaling import Scalings


@dataclass(frozen=True)
class Round:
    """The updates of one round.

    Attributes:
        index: the round's index, from 0.
        layout: the layout of the result; with the largest ranks, where ranks differ.
        clients: the N updates.
        positions: the place of each client among all that sent something, from 0.
        weights: one per client, non-negative, not all zero; only their ratios matter.
        reference: the adapter that the clients started from, or the update that stands in for it.
        scalings: the scalings of clients and result; None where they play no part, or no LoRA configuration was given.
    """

    index: int
    layout: Layout
    clients: Sequence[Update]
    positions: Sequence[int]
    weights: Sequence[float]
    reference: Update
    scalings: Scalings | None


@dataclass(frozen=True)
class Averages:
    """The means of N clients.

    Attributes:
        mean: canonical key → mean, in the updates' shapes and dtypes, each with storage of its own.
        A, B: per adapter of the layout the N clients' factors as matrices, which may share memory with the updates; empty
            where the errors are given.
        R: per adapter the clients' rotations (N, r, r), or None if no client was rotated.
        residual: ‖RᵀR − I‖_max of every rotation, (L, N), or None.
        sound: whether every mean is finite and every R is a rotation.
        base: key → factor, A (K, d_in, …) and B (d_out, K, …), of the B·A that is to be added to the base weights, or None.
        errors: per adapter ‖Σ wᵢBᵢAᵢ − result‖_F, ‖Σ wᵢBᵢAᵢ‖_F and, if it is known, what the plain average would lose, where
            the method measured them itself; None in their places where it was to leave them out.
        strengths: per adapter λ, where the method chose it.
        estimates: estimates of errors that the kernels made; else None.
        angles: (L, N), the rotation angles in degrees, where the kernels measured them; else None.
        ranks: per adapter the rank of the result, where the method chose it; else None.
        undetermined: (L, N), in how many directions of its own nothing determines a client's rotation; None where no client
            was rotated, or the method does not count them.
    """

    mean: dict[str, Tensor]
    A: Factors
    B: Factors
    R: list[Tensor] | None
    residual: Tensor | None
    sound: bool
    base: dict[str, Tensor] | None = None
    errors: Sequence[tuple[float | None, float | None] | tuple[float | None, float | None, float | None]] | None = None
    strengths: Sequence[float] | None = None
    ranks: Sequence[int] | None = None
    undetermined: Tensor | None = None
    estimates: Estimates | None = None
    angles: Tensor | None = None
