"""The SVD of a mean update from its stacked factors, and how many of its directions to keep."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..seeding import generator
from .low_rank import stacked

_OVERSAMPLED, _PASSES = 8, 4
_BLOCKS = 4  # times the block's vectors: of fewer rows the SVD takes less time
_ROUNDING = 128  # times eps and σ₁: what rounding leaves of M V − U Σ in products of some hundred rows


class Svd(NamedTuple):
    """U (G, d_out, k), σ (G, K) and Vᵀ (G, k, d_in) of G mean updates: all K singular values, and the leading k vectors."""

    U: Tensor
    sigma: Tensor
    Vt: Tensor


def mean_svd(A: Tensor, B: Tensor, w: Tensor, k: int | None = None) -> Svd | None:
    """The SVD of Σ wᵢBᵢAᵢ = S_B S_A: with S_B = Q_B R_B and S_Aᵀ = Q_A R_A, that of R_B R_Aᵀ, of N r rows and columns.

    Args:
        A, B, w: as for ``LowRankMethod.combine``.
        k: the number of singular vectors; None for all.

    Returns:
        The SVD; None where the products overflow, which ``torch.linalg.svd`` would not report by its name.
    """
    S_A, S_B = stacked(A, B, w)
    Q_B, R_B = torch.linalg.qr(S_B)
    Q_A, R_A = torch.linalg.qr(S_A.mT)
    M = R_B @ R_A.mT
    if not bool(M.isfinite().all()):
        return None
    U, sigma, Vt = torch.linalg.svd(M, full_matrices=False)
    return Svd(Q_B @ U[:, :, :k], sigma, Vt[:, :k] @ Q_A.mT)


def leading_svd(A: Tensor, B: Tensor, w: Tensor, k: int) -> Svd | None:
    """The leading k singular triplets of Σ wᵢBᵢAᵢ, as ``mean_svd`` has them, in less time where N r is large beside k.

    Subspace iteration on k + 8 vectors (Halko, Martinsson and Tropp, arXiv 0909.4061) from the clients' mean rows and random
    ones, with U and V of every pass from the small matrix QᵀM. A pass ends it when ‖M V_k − U_kΣ_k‖_F is rounding, and
    UᵀM = ΣVᵀ always holds. Adapters that four passes do not bring there have singular values too close to each other, and
    take ``mean_svd``.

    Args:
        A, B, w, k: as for ``mean_svd``.
    """
    N, r, block = A.shape[1], A.shape[2], k + _OVERSAMPLED
    if N * r < _BLOCKS * block or min(A.shape[3], B.shape[2]) < 2 * block:
        return mean_svd(A, B, w, k)
    S_A, S_B, rows = A.flatten(1, 2), B.transpose(1, 2).flatten(2), w.repeat_interleave(r)[:, None]
    start = torch.randn(N * r, block, generator=generator(0, N * r, block), dtype=A.dtype, device="cpu").to(A.device)
    shared = min(r, block)
    start[:, :shared] = rows * torch.eye(r, shared, dtype=A.dtype, device=A.device).repeat(N, 1)
    V, U, sigma = S_A.mT @ start, B.new_zeros(()), B.new_zeros(())
    converged = torch.zeros(len(A), dtype=torch.bool, device=A.device)
    for step in range(_PASSES + 1):
        MV = S_B @ (rows * (S_A @ V))
        if not bool(MV.isfinite().all()):
            return None
        if step:
            left = torch.linalg.vector_norm(MV[..., :k] - U[..., :k] * sigma[:, None, :k], dim=(1, 2))
            converged = left <= _ROUNDING * torch.finfo(A.dtype).eps * sigma[:, 0]
            if step == _PASSES or bool(converged.all()):
                break
        Q = torch.linalg.qr(MV).Q
        Q_V, T = torch.linalg.qr((((Q.mT @ S_B) * rows.mT) @ S_A).mT)
        X, sigma, Yt = torch.linalg.svd(T.mT)
        U, V = Q @ X, Q_V @ Yt.mT
    U, sigma, Vt = U[..., :k].contiguous(), sigma[:, :k].contiguous(), V.mT[:, :k].contiguous()
    if len(others := (~converged).nonzero()[:, 0]):
        found = mean_svd(A[others], B[others], w, k)
        if found is None:
            return None
        U[others], sigma[others], Vt[others] = found.U, found.sigma[:, :k], found.Vt
    return Svd(U, sigma, Vt)


def shared_evenly(svd: Svd, ranks: slice, size: int) -> tuple[Tensor, Tensor]:
    """√Σ Vᵀ (G, size, d_in) and U√Σ (G, d_out, size) of some singular triplets; rows of zero where there are fewer."""
    root = svd.sigma[:, : svd.Vt.shape[1]][:, ranks].sqrt()
    A = svd.Vt.new_zeros(len(root), size, svd.Vt.shape[2])
    B = svd.U.new_zeros(len(root), svd.U.shape[1], size)
    k = root.shape[1]
    A[:, :k] = root[:, :, None] * svd.Vt[:, ranks]
    B[:, :, :k] = svd.U[:, :, ranks] * root[:, None]
    return A, B


def count_energy(sigma: Tensor, energy: float, dimension: int) -> list[int]:
    """The least numbers of singular values whose squares sum to a part of all, at least 1.

    What is left out is summed, from the smallest on: at ``energy=1`` only rounding is, of a matrix of the given dimension.

    Args:
        sigma: (G, K), descending.
        energy: the part, above 0 and at most 1.
        dimension: of the matrix that the singular values were computed from.
    """
    noise = dimension * torch.finfo(sigma.dtype).eps * sigma[:, :1]
    squares = torch.where(sigma > noise, sigma, 0).double().square()
    left_out = squares.flip(1).cumsum(1).flip(1)  # by keeping none, one, …
    needed: list[int] = (left_out > (1 - energy) * left_out[:, :1]).sum(1).clamp(min=1).tolist()
    return needed
