"""The SVD of a mean update from its stacked factors, and how many of its directions to keep."""

from typing import NamedTuple

import torch
from torch import Tensor

from .low_rank import stacked


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
