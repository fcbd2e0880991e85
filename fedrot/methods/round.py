"""What goes into a method and what comes out: the updates of one round, and their averages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

import fedrot_kernels as fk

from ..adapters.layout import Layout
from ..adapters.update import Update
from ..ranks.scaling import Scalings


@dataclass(frozen=True)
class Round:
    """The updates of one round.

    Attributes:
        number: from 0.
        layout: of the updates; with the largest ranks, where ranks differ.
        clients: the N updates.
        numbers: of the clients among all that sent something, from 0.
        weights: one per client, non-negative, not all zero; only their ratios matter.
        reference: the adapter that the clients started from, or what stands in for it.
        scalings: of clients and result; None where they play no part, or no LoRA configuration was given.
        strengths: module → λ of the last round, where it is chosen.
        backend: of the kernels.
        report_error: whether the aggregation error is asked for.
    """

    number: int
    layout: Layout
    clients: Sequence[Update]
    numbers: Sequence[int]
    weights: Sequence[float]
    reference: Update
    scalings: Scalings | None
    strengths: Mapping[str, float]
    backend: fk.Backend
    report_error: bool


@dataclass(frozen=True)
class Averages:
    """The means of N clients.

    Attributes:
        mean: canonical key → mean, in the updates' shapes and dtypes, each with storage of its own.
        A, B: per adapter of the layout the N clients' factors as matrices, which may share memory with the updates; empty
            where the errors are given.
        R: per adapter (N, r, r) what the clients' B were multiplied by, rotations but for the group GL; None if nothing was.
        residual: (L, N) ‖RᵀR − I‖_max, or None.
        sound: whether every mean is finite and every rotation is one.
        base: key → factor, A (K, d_in, …) and B (d_out, K, …), of B·A to be added to the base weights, or None.
        errors: per adapter ‖Σ wᵢBᵢAᵢ − result‖_F and ‖Σ wᵢBᵢAᵢ‖_F, where a method measured them itself; None where it was
            not to.
        strengths: per adapter λ, where it was chosen.
    """

    mean: dict[str, Tensor]
    A: list[list[Tensor]]
    B: list[list[Tensor]]
    R: list[Tensor] | None
    residual: Tensor | None
    sound: bool
    base: dict[str, Tensor] | None = None
    errors: Sequence[tuple[float | None, float | None]] | None = None
    strengths: Sequence[float] | None = None
