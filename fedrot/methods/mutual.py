"""One round's updates, aligned to each other and averaged: consensus, least error, and a strength chosen by the error."""

from typing import TYPE_CHECKING

import torch

import fedrot_kernels as fk

from ..options import Alignment
from .averaging import matrices
from .rotation import LARGEST_RESIDUAL
from .round import Averages

if TYPE_CHECKING:
    from .round import Round


def align_mutually(round: "Round", alignment: Alignment) -> Averages:
    """Align all clients of a round together and average them. The errors of the report come with it."""
    layout, clients = round.layout, round.clients
    A, B = (
        [matrices([client[key] for client in clients]) for key in keys] for keys in zip(*layout.factor_keys, strict=True)
    )
    A_ref, B_ref = (matrices([round.reference[key] for key in keys]) for keys in zip(*layout.factor_keys, strict=True))
    target: fk.Target = "reference"
    if alignment.align_on == "error":
        target = "error"
    elif alignment.consensus:
        target = "consensus"
    aligned = fk.align_together(
        A,
        B,
        round.weights,
        A_ref=A_ref,
        B_ref=B_ref,
        target=target,
        on="".join(alignment.factors(round.number)),
        group=alignment.group,
        strength=None if alignment.strength == "auto" else alignment.fixed_strength,
        prior=[round.strengths.get(a.module, 0.5) for a in layout.adapters],
    )
    mean = {}
    for (key_A, key_B), mean_A, mean_B in zip(layout.factor_keys, aligned.A, aligned.B, strict=True):
        mean[key_A] = mean_A.view(layout.specs[key_A].shape)
        mean[key_B] = mean_B.view(layout.specs[key_B].shape)
    checks = [aligned.finite, (aligned.residual <= LARGEST_RESIDUAL).all()]
    if layout.plain:
        plain, finite = fk.average([[c[key] for c in clients] for key in layout.plain], round.weights, backend=round.backend)
        mean |= zip(layout.plain, plain, strict=True)
        checks.append(finite)
    errors = list(zip(aligned.error.tolist(), aligned.update_norm.tolist(), strict=True))
    return Averages(
        {key: mean[key] for key in layout.specs},
        A,
        B,
        aligned.G,
        aligned.residual,
        bool(torch.stack(checks).all()),
        errors=errors if round.report_error else [(None, None)] * len(errors),
        strengths=aligned.strengths.tolist() if alignment.strength == "auto" else None,
    )
