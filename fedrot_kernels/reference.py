"""The mathematics as plainly as possible: one adapter, any float dtype, by SVD. The oracle of the tests.

Frames follow one convention everywhere: F is (r, d) with a row per rank, so F = A, F = Bᵀ or F = [A | Bᵀ]; a rotation
R (r, r) acts as Rᵀ F. The tests run it in float64.
"""

import torch
from torch import Tensor


def cross_covariance(F: Tensor, F_ref: Tensor) -> Tensor:
    """M = F F_refᵀ, (r, r)."""
    return F @ F_ref.T


def polar(M: Tensor) -> Tensor:
    """R = argmax tr(RᵀM) over O(r); of several maxima the one nearest the identity."""
    U, S, Vh = torch.linalg.svd(M)
    rank = int((S > S[0] * M.shape[-1] * torch.finfo(M.dtype).eps).sum())
    R: Tensor = U[:, :rank] @ Vh[:rank]
    if rank < len(S):  # complete on the null space with U₂ Q V₂ᵀ, Q = argmax tr(U₂ Q V₂ᵀ)
        U2, V2h = U[:, rank:], Vh[rank:]
        P, _, Qh = torch.linalg.svd(U2.T @ V2h.T)
        R = R + U2 @ P @ Qh @ V2h
    return R


def special_orthogonal(M: Tensor) -> Tensor:
    """R = argmax tr(RᵀM) over SO(r): the polar factor, its weakest direction flipped where det(R) < 0."""
    R = polar(M)
    if torch.linalg.det(R) < 0:
        H = R.T @ M
        v = torch.linalg.eigh((H + H.T) / 2).eigenvectors[:, 0]
        R = R - 2 * torch.outer(R @ v, v)
    return R


def soften(R: Tensor, strength: float) -> Tensor:
    """R_λ = polar((1−λ) I + λ R): from the identity (λ = 0) to R (λ = 1)."""
    return polar((1 - strength) * torch.eye(len(R), dtype=R.dtype) + strength * R)


def rotate_average(F: list[Tensor], R: list[Tensor], weights: list[float]) -> Tensor:
    """F̄ = Σ wᵢ RᵢᵀFᵢ with Σ wᵢ = 1, (r, d)."""
    total = sum(weights)
    return torch.stack([w / total * Ri.T @ Fi for w, Ri, Fi in zip(weights, R, F, strict=True)]).sum(0)


def aggregation_error(A: list[Tensor], B: list[Tensor], weights: list[float]) -> Tensor:
    """‖Σ wᵢBᵢAᵢ − B̄Ā‖_F with Σ wᵢ = 1, by its definition (forms d_out × d_in matrices)."""
    total = sum(weights)
    mean_update = torch.stack([w / total * Bi @ Ai for w, Ai, Bi in zip(weights, A, B, strict=True)]).sum(0)
    mean_A = torch.stack([w / total * Ai for w, Ai in zip(weights, A, strict=True)]).sum(0)
    mean_B = torch.stack([w / total * Bi for w, Bi in zip(weights, B, strict=True)]).sum(0)
    error: Tensor = torch.linalg.norm(mean_update - mean_B @ mean_A)
    return error
