"""FLoRA-NA (arXiv 2509.26399): weights of A and weights of B, that bring B̂Â as near the mean update as they can."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .low_rank import Combined, LowRankMethod

STEPS = 100
CONVERGED = 1e-10  # of ‖ΔW̄‖²: a smaller descent in one step ends the descent
RIDGE = 1e-12  # of the normal matrix's trace, whose rounding is a thousandth of it


class FLoRANA(LowRankMethod):
    """Â = Σ pᵢAᵢ and B̂ = Σ qᵢBᵢ with the vectors p and q of each adapter that minimise ‖Σ wᵢBᵢAᵢ − B̂Â‖_F.

    Alternating least squares from p = q = w, which is FedIT, so that the error is never above FedIT's; each step solves N
    equations that Gram matrices of the factors give. p and q are not constrained, and need not sum to 1.
    """

    name = "flora-na"
    paper = "arXiv 2509.26399"
    cost = "N² r² d + N³"
    exact = "when weights of the factors can make it so"
    unequal_ranks = "stack"
    supports_server_optimizer = False

    def combine(self, A: Tensor, B: Tensor, w: Tensor, dtype: torch.dtype) -> Combined:
        """See ``LowRankMethod.combine``."""
        rows, columns = A.double().flatten(1, 2), B.double().transpose(1, 2).flatten(2)
        gram_A, gram_B = _scaled(rows @ rows.mT, B.shape[1::2]), _scaled(columns.mT @ columns, B.shape[1::2])
        if not bool(torch.stack([gram_A.isfinite().all(), gram_B.isfinite().all()]).all()):
            return Combined(torch.full_like(A[:, 0], torch.nan), torch.full_like(B[:, 0], torch.nan))
        p, q = (x.to(A.dtype) for x in nearest_weights(gram_A, gram_B, w.double()))
        return Combined(torch.einsum("gn,gnrd->grd", p, A), torch.einsum("gn,gndr->gdr", q, B))


def nearest_weights(gram_A: Tensor, gram_B: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of G adapters; see ``FLoRANA``.

    Args:
        gram_A, gram_B: AᵢAⱼᵀ and BᵢᵀBⱼ, (G, N, r, N, r), float64.
        w: (N,), summing to 1; a client of weight 0 keeps it.

    Returns:
        p and q, (G, N).
    """
    p = q = w.expand(len(gram_A), -1)
    used = (w > 0).to(w.dtype)
    size = torch.einsum("k,l,gkalb,gkalb->g", w, w, gram_B, gram_A)
    before = torch.full_like(size, torch.inf)
    for _ in range(STEPS):
        p, _ = _solve(p, q, gram_A, gram_B, w, used)
        q, error = _solve(q, p, gram_B, gram_A, w, used)
        if bool((before - error <= CONVERGED * size).all()):
            break
        before = error
    return p, q


def _solve(x: Tensor, other: Tensor, gram: Tensor, gram_other: Tensor, w: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """One factor's weights of least error for the other's weights, near the present ones where these do not matter.

    Args:
        x, other: the weights of this factor and of the other, (G, N).
        gram, gram_other: their Gram matrices, (G, N, r, N, r).
        w, used: the weights of the mean, and which of them are not 0.

    Returns:
        The weights, and ‖Σ wᵢBᵢAᵢ − B̂Â‖² − ‖Σ wᵢBᵢAᵢ‖².
    """
    crossed = torch.einsum("gj,gkajb->gkab", other, gram_other)  # of client k's other factor with the mean's
    H = torch.einsum("gab,giajb->gij", torch.einsum("gk,gkab->gab", other, crossed), gram) * used * used[:, None]
    h = torch.einsum("k,gkab,gkaib->gi", w, crossed, gram) * used
    trace = H.diagonal(dim1=1, dim2=2).sum(1)
    ridge = torch.where(trace > 0, RIDGE * trace, 1)[:, None, None] * torch.eye(len(w), dtype=w.dtype, device=w.device)
    factor = torch.linalg.cholesky(H + ridge)
    residual = h - (H @ x[..., None])[..., 0]
    x = x + torch.cholesky_solve(residual[..., None], factor)[..., 0]
    return x, (x * ((H @ x[..., None])[..., 0] - 2 * h)).sum(1)


def _scaled(gram: Tensor, shape: Sequence[int]) -> Tensor:
    """Gram matrices (G, N·r, N·r) divided by their traces, which changes no weights, as (G, N, r, N, r)."""
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    scaled: Tensor = gram / torch.where(trace > 0, trace, 1)[:, None, None]
    return scaled.view(len(gram), *shape, *shape)
