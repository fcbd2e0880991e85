"""GLoRA (arXiv 2605.06733): the mean update in the subspace that the clients' column spaces have in common."""

import torch
from torch import Tensor

from .low_rank import Combined, LowRankMethod, stacked
from .mean_update import Svd, shared_evenly


class GLoRA(LowRankMethod):
    """The result is UUᵀΔW̄, U the leading R eigenvectors of Σ wᵢUᵢUᵢᵀ, the mean of the projectors onto the columns of Bᵢ.

    With C = UᵀΔW̄ = XΣYᵀ, B̄ = UX√Σ and Ā = √ΣYᵀ, so that ``fedrot.truncate`` gives a client the truncated SVD of UC in its
    rank. R is ``server_rank``, or the largest rank of the clients. The abstract, from which this is written, does not say
    whether projectors are weighted; here they are.
    """

    name = "glora"
    paper = "arXiv 2605.06733"
    cost = "N² r² d + N³ r³"
    exact = "when the mean update lies in the subspace of rank R"
    uses = frozenset({"server_rank"})
    unequal_ranks = "stack"
    supports_server_optimizer = False

    def combine(self, A: Tensor, B: Tensor, w: Tensor, dtype: torch.dtype) -> Combined:
        """See ``LowRankMethod.combine``."""
        R = self.options.server_rank or A.shape[2]
        S_A, S_B = stacked(A, B, w)
        if not bool(torch.stack([S_A.isfinite().all(), S_B.isfinite().all()]).all()):
            return Combined(torch.full_like(A[:, 0], torch.nan), torch.full_like(B[:, 0], torch.nan))
        U = common_subspace(B, w, R)
        Q, T = torch.linalg.qr(((U.mT @ S_B) @ S_A).mT)
        if not bool(T.isfinite().all()):  # C overflows
            return Combined(torch.full_like(A[:, 0], torch.nan), torch.full_like(B[:, 0], torch.nan))
        X, sigma, Yt = torch.linalg.svd(T.mT, full_matrices=False)
        return Combined(*shared_evenly(Svd(U @ X, sigma, Yt @ Q.mT), slice(R), R))


def common_subspace(B: Tensor, w: Tensor, R: int) -> Tensor:
    """The leading left singular vectors of [√w₁U₁ … √w_N U_N], Uᵢ an orthonormal basis of the columns of Bᵢ.

    Args:
        B: (G, N, d_out, r). Columns that rounding makes independent count as none.
        w: (N,).
        R: the number of vectors.

    Returns:
        U (G, d_out, R), with fewer columns where d_out or N r is smaller.
    """
    Q, T = torch.linalg.qr(B)
    X, sigma, _ = torch.linalg.svd(T)
    noise = max(B.shape[2:]) * torch.finfo(B.dtype).eps * sigma[..., :1]
    bases = (Q @ X) * (w.sqrt()[:, None] * (sigma > noise))[..., None, :]
    Q, T = torch.linalg.qr(bases.transpose(1, 2).flatten(2))
    subspace: Tensor = Q @ torch.linalg.svd(T).U[:, :, :R]
    return subspace
