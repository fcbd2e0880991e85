"""raFLoRA's weights (arXiv 2602.13486) for means of padded factors: each direction over the clients that have it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedrot_kernels import full_precision, product_norm, widen

from ..adapters.layout import Adapter, as_matrix
from ..adapters.update import Update
from ..ranks.padding import rank_mask
from ..ranks.prepare import PreparedRound
from .round import Averages
from .running_mean import shares_of


@full_precision
def undo_collapse(averages: Averages, prepared: PreparedRound, *, measure: bool) -> Averages:
    """Undo how the means of a round shrink in the directions that few clients have.

    Args:
        averages: the averages of clients that were padded.
        prepared: the round.
        measure: whether to measure the errors of the new means, exactly.
    """
    mean, errors, shares = dict(averages.mean), [], shares_of(prepared.weights)
    for i, a in enumerate(prepared.layout.adapters):
        own = rank_mask(a, prepared.clients)
        has = torch.diag_embed(own[..., 0].double()) if averages.R is None else averages.R[i].cpu().double() * own
        inverse = inverse_share(has, shares).to(mean[a.key_A].device)
        A, B = widen(as_matrix(mean[a.key_A])), widen(as_matrix(mean[a.key_B]))
        mean[a.key_A] = (inverse.to(A.dtype) @ A).reshape(mean[a.key_A].shape)
        mean[a.key_B] = (B @ inverse.to(B.dtype)).reshape(mean[a.key_B].shape)
        if measure:
            errors.append(_errors(a, prepared.clients, shares, mean[a.key_A], mean[a.key_B]))
    return replace(averages, mean=mean, errors=errors or None, estimates=None, A=[], B=[])


def inverse_share(has: Tensor, shares: Sequence[float]) -> Tensor:
    """The inverse of the share of the clients in every direction of the result.

    A client of rank rᵢ is put into the r rows of the result by a partial isometry Rᵢ, whose last r − rᵢ rows are zero. It
    takes part in the mean within the range of Pᵢ = RᵢᵀRᵢ, and S = Σ wᵢPᵢ. Where all ranges are first rows, S⁻¹Ā and B̄S⁻¹
    average each block of rows with raFLoRA's weights N_k / N_h. Shares between 0 and the least weight of a client, which
    ranges leave that are almost parallel, count as that weight, so that rounding is not divided by next to nothing.

    Args:
        has: Rᵢ, (N, r, r), float64.
        shares: the clients' weights, summing to 1.

    Returns:
        S⁻¹ (r, r), the identity where no client has a direction.
    """
    w = torch.tensor(shares, dtype=torch.float64, device="cpu")
    share, V = torch.linalg.eigh(torch.einsum("n,nij,nik->jk", w, has, has))
    least = float(w[w > 0].min())
    scale = torch.where(share > 1e-6 * least, 1 / share.clamp(min=least), 1)
    inverse: Tensor = (V * scale) @ V.mT
    return inverse


def _errors(a: Adapter, clients: Sequence[Update], shares: Sequence[float], A: Tensor, B: Tensor) -> tuple[float, float]:
    """‖Σ wᵢBᵢAᵢ − B A‖_F and ‖Σ wᵢBᵢAᵢ‖_F in float64."""
    right = torch.cat([as_matrix(client[a.key_A]).double() for client in clients])
    left = torch.cat([w * as_matrix(client[a.key_B]).double() for w, client in zip(shares, clients, strict=True)], 1)
    error = product_norm(torch.cat([left, -as_matrix(B).double()], 1)[None], torch.cat([right, as_matrix(A).double()])[None])
    return float(error), float(product_norm(left[None], right[None]))
