"""What averaging factors loses and how far clients were rotated."""

import math

import torch
from torch import Tensor

from fedrot_kernels import full_precision

_COLUMNS = 256  # of the error formed at a time, where that is cheaper than Gram matrices


@full_precision
def aggregation_error(A: Tensor, B: Tensor, weights: Tensor) -> tuple[float, float]:
    """‖Σ wᵢBᵢAᵢ − B̄Ā‖_F and ‖Σ wᵢBᵢAᵢ‖_F of one adapter, without a d_out × d_in matrix.

    Uses Σ wᵢBᵢAᵢ − B̄Ā = Σ wᵢ (Bᵢ−B̄)(Aᵢ−Ā) = S_B S_A, hence ‖S_B S_A‖² = Σ (S_BᵀS_B) ∘ (S_A S_Aᵀ), two Gram matrices
    of N·r rows; or, where there are so many clients that this is more work, S_B S_A itself a few columns at a time.

    Args:
        A: (N, r, d_in), the factors as they are averaged, float32 or float64.
        B: (N, d_out, r).
        weights: (N,), summing to 1.

    Returns:
        The error and the norm of the mean update B·A (the scaling s is left out of both).
    """
    n, r, d_in = A.shape
    d_out = B.shape[1]
    w = weights.to(A.dtype)[:, None, None]
    mean_A, mean_B = (w * A).sum(0), (w * B).sum(0)
    # A client's rows scaled by √w in both factors; the mean as one more client of weight 1 completes Σ wᵢBᵢAᵢ.
    S_A = torch.cat([(w.sqrt() * (A - mean_A)).reshape(n * r, d_in), mean_A])
    S_B = torch.cat([(w.sqrt() * (B - mean_B)).transpose(0, 1).reshape(d_out, n * r), mean_B], dim=1)
    k = n * r
    if k * (d_in + d_out) <= d_in * d_out:
        products = ((S_B.T @ S_B) * (S_A @ S_A.T)).double()
        error, update = products[:k, :k].sum(), products.sum()
    else:
        error, update = torch.zeros((2,), dtype=torch.float64, device=A.device)
        for columns in S_A.split(_COLUMNS, dim=1):
            E = S_B[:, :k] @ columns[:k]
            error = error + E.double().square().sum()
            update = update + (E + S_B[:, k:] @ columns[k:]).double().square().sum()
    return math.sqrt(max(error.item(), 0.0)), math.sqrt(max(update.item(), 0.0))


def rotation_angle(R: Tensor) -> Tensor:
    """How far R rotates, in degrees: 2 arcsin(‖R − I‖_F / (2√r)), 0 for I and 180 for −I.

    It is the angle by which turning every direction would move the frame as far as R does (in the root mean square).

    Args:
        R: (..., r, r), orthogonal.

    Returns:
        (...), float32 or float64.
    """
    r = R.shape[-1]
    chord = torch.linalg.matrix_norm(R - torch.eye(r, dtype=R.dtype, device=R.device))
    return torch.rad2deg(2 * torch.asin((chord / (2 * math.sqrt(r))).clamp(max=1)))
