"""Methods that align the clients of a round together, so that one client's rotation depends on the others."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

import fedrot_kernels as fk

from ..adapters.columns import client_factors, matrices
from ..adapters.layout import Layout
from ..adapters.update import Update
from ..ranks.padding import rank_mask
from .averaging import average_round
from .base import Method
from .rotation import LARGEST_RESIDUAL, trained_references
from .round import Averages, Round


def padded_rows(layout: Layout, clients: Sequence[Update]) -> Tensor:
    """The number of rows of each client that are padding, (L, N)."""
    return torch.stack([(~rank_mask(a, clients)).sum((1, 2)) for a in layout.adapters])


class GroupwiseMethod(Method):
    """Aligns in Gram space. Subclasses name what is minimised, and the factors that count."""

    unequal_ranks = "pad"
    minimises: ClassVar[fk.Target]

    @abstractmethod
    def on(self, round: int) -> str:
        """The factors that count in the round of this index: "A", "B" or "AB"."""

    @property
    def chooses_strength(self) -> bool:
        """Whether the method chooses λ for every adapter itself."""
        return False

    @property
    def aligns(self) -> bool:
        """Whether clients are aligned: unless λ is 0, which is FedIT to the bit."""
        return self.chooses_strength or self.strength > 0

    @property
    def needs_all(self) -> bool:  # type: ignore[override]
        """Whether all updates are needed at once, to align them or to know the ranks of all."""
        return self.aligns or self.options.collapse != "none"

    def aggregate(self, round: Round) -> Averages:
        """Align all clients of a round together and average them. The report's errors come with it where PyTorch aligns."""
        if not self.aligns:
            return average_round(round, self.options)
        layout, clients = round.layout, round.clients
        A, B = client_factors(layout, clients)
        if self.minimises == "reference":
            A_ref, B_ref = trained_references(layout.adapters, round.reference, self.on(round.index))
        else:  # which fixes only the basis of the result
            A_ref, B_ref = (
                matrices([round.reference[key] for key in keys]) for keys in zip(*layout.factor_keys, strict=True)
            )
        aligned = fk.align_together(
            A,
            B,
            round.weights,
            A_ref=A_ref,
            B_ref=B_ref,
            target=self.minimises,
            on=self.on(round.index),
            reflections=self.options.reflections,
            strength=None if self.chooses_strength else self.strength,
            backend=self.options.backend,
            sketch_seed=self.options.seed if self.options.report_error == "estimate" else None,
        )
        mean = {}
        for (key_A, key_B), mean_A, mean_B in zip(layout.factor_keys, aligned.A, aligned.B, strict=True):
            mean[key_A] = mean_A.view(layout.specs[key_A].shape)
            mean[key_B] = mean_B.view(layout.specs[key_B].shape)
        checks = [aligned.finite, (aligned.residual <= LARGEST_RESIDUAL).all()]
        if layout.other_keys:
            tensors = [[c[key] for c in clients] for key in layout.other_keys]
            others, finite = fk.average(tensors, round.weights, backend=self.options.backend)
            mean |= zip(layout.other_keys, others, strict=True)
            checks.append(finite)
        measured = aligned.error, aligned.update_norm, aligned.plain_error
        values = [x.tolist() for x in measured if x is not None]
        return Averages(
            {key: mean[key] for key in layout.specs if key in mean},
            A,
            B,
            aligned.R,
            aligned.residual,
            bool(torch.stack(checks).all()),
            errors=list(zip(*values, strict=True)) if values and self.options.report_error else None,
            strengths=aligned.strengths.tolist() if self.chooses_strength else None,
            undetermined=None if aligned.undetermined is None else aligned.undetermined - padded_rows(layout, clients),
            estimates=aligned.estimates,
            angles=aligned.angles,
        )
