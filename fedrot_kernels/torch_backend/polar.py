"""Polar factors: by Newton–Schulz for batches of well-conditioned matrices, by an SVD in float64 for all others."""

import torch
from torch import Tensor


def normalize(M: Tensor) -> Tensor:
    """M/‖M‖_F of M (n, r, r), of any scale; I where M is zero, NaN where it is not finite."""
    largest = M.abs().amax((-1, -2), keepdim=True)
    X = M / torch.where(largest == 0, 1, largest)  # before the norm, whose squares under- and overflow
    X = X / torch.linalg.vector_norm(X, dim=(-1, -2), keepdim=True)
    X = torch.where(largest == 0, torch.eye(M.shape[-1], dtype=M.dtype, device=M.device), X)
    return torch.where(largest.isfinite(), X, torch.nan)


def exact_polar(X: Tensor, floor: float | Tensor, *, reflections: bool) -> tuple[Tensor, Tensor]:
    """The orthogonal matrices nearest to X, by SVD: R = U Vᵀ, with the last column of U negated where det must be +1.

    Directions in which σ is below ``floor`` say nothing. Of all R that agree in the others, the one nearest the identity is
    taken; where det must be +1, the nearest of those.

    Args:
        X: (n, r, r) float64, on the CPU.
        floor: below which singular values count as zero, also one per matrix, (n,); at least r times eps of float64.
        reflections: False for SO(r), True for O(r).

    Returns:
        (n, r, r), and how many directions of each say nothing, (n,).
    """
    r = X.shape[-1]
    U, S, Vh = torch.linalg.svd(X)
    least = torch.as_tensor(floor, dtype=X.dtype, device=X.device).clamp_min(r * torch.finfo(X.dtype).eps)
    rank = (least.reshape(-1, 1) <= S).sum(-1)
    sign = torch.ones(len(X), dtype=X.dtype, device=X.device)
    if not reflections:
        sign = torch.linalg.det(U).sign() * torch.linalg.det(Vh).sign()
    U[:, :, -1] *= torch.where(rank == r, sign, 1)[:, None]
    R = U @ Vh
    for k in rank[rank < r].unique().tolist():
        some = (rank == k).nonzero().squeeze(-1)
        U2, V2h = U[some, :, k:], Vh[some, k:]
        P, _, Qh = torch.linalg.svd(U2.mT @ V2h.mT)  # U₂ Q V₂ᵀ is nearest the identity for Q = P Qhᵀ
        if not reflections:
            P[:, :, -1] *= (sign[some] * torch.linalg.det(P).sign() * torch.linalg.det(Qh).sign())[:, None]
        R[some] = U[some, :, :k] @ Vh[some, :k] + U2 @ P @ Qh @ V2h
    return R, r - rank
