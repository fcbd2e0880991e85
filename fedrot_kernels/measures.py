"""Measures of an alignment: the aggregation error, its bound, and how far clients were rotated."""

import torch
from torch import Tensor

from .precision import full_precision

_COLUMNS = 256  # columns of the error that are formed at a time, where that is cheaper than Gram matrices


@full_precision
def aggregation_error(A: Tensor, B: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """‖Σ wᵢBᵢAᵢ − B̄Ā‖_F and ‖Σ wᵢBᵢAᵢ‖_F of G adapters of one shape, without a d_out × d_in matrix.

    With Σ wᵢBᵢAᵢ − B̄Ā = Σ wᵢ (Bᵢ−B̄)(Aᵢ−Ā) = S_B S_A, the squared error is Σ (S_BᵀS_B) ∘ (S_A S_Aᵀ), of two Gram matrices
    of N·r rows. Where there are so many clients that this is more work, S_B S_A itself is formed a few columns at a time.

    Args:
        A: (G, N, r, d_in), the factors as they are averaged, float32 or float64.
        B: (G, N, d_out, r), likewise.
        weights: (N,), summing to 1.

    Returns:
        The errors and the norms of the mean update B·A, each (G,) in float64. The scaling s is left out of both.
    """
    d_in, d_out, k = A.shape[-1], B.shape[-2], A.shape[1] * A.shape[2]
    S_A, S_B = _centered(A, weights), _centered(B.mT, weights).mT
    if k * (d_in + d_out) <= d_in * d_out:
        products = ((S_B.mT @ S_B) * (S_A @ S_A.mT)).double()
        error, update = products[:, :k, :k].sum((1, 2)), products.sum((1, 2))
    else:
        error, update = torch.zeros((2, len(A)), dtype=torch.float64, device=A.device)
        for start in range(0, d_in, _COLUMNS):
            columns = S_A[..., start : start + _COLUMNS]
            E = S_B[..., :k] @ columns[:, :k]
            error = error + E.double().square().sum((1, 2))
            update = update + (E + S_B[..., k:] @ columns[:, k:]).double().square().sum((1, 2))
    return error.clamp(min=0).sqrt(), update.clamp(min=0).sqrt()


@full_precision
def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """‖B A‖_F by Gram matrices, unless B A is the smaller matrix.

    By Gram matrices, a norm that is small beside ‖B‖‖A‖ loses half the digits of the dtype.

    Args:
        B: (G, d_out, K).
        A: (G, K, d_in), of B's dtype.

    Returns:
        (G,), of the same dtype.
    """
    (d_out, k), d_in = B.shape[1:], A.shape[2]
    if d_out * d_in <= k * (d_out + d_in):
        norm: Tensor = torch.linalg.matrix_norm(B @ A)
        return norm
    return ((B.mT @ B) * (A @ A.mT)).sum((1, 2)).clamp(min=0).sqrt()


def _centered(F: Tensor, weights: Tensor) -> Tensor:
    """√wᵢ (Fᵢ − F̄) of every client, then F̄, which completes Σ wᵢBᵢAᵢ: (G, N·r + r, d) from F (G, N, r, d)."""
    w = weights.to(F.dtype)
    mean = torch.einsum("n,gnrd->grd", w, F)
    S = F.new_empty(len(F), F.shape[1] + 1, *F.shape[2:])
    torch.sub(F, mean[:, None], out=S[:, :-1])
    S[:, :-1] *= w.sqrt()[:, None, None]
    S[:, -1] = mean
    return S.flatten(1, 2)


def rotation_angle(R: Tensor) -> Tensor:
    """How far R rotates, in degrees: 2 arcsin(‖R − I‖_F / (2√r)), 0 for I and 180 for −I.

    Turning every direction by this angle would move a frame as far as R does, in the root mean square.

    Args:
        R: (..., r, r), orthogonal. The rotation of a client of smaller rank rᵢ is a partial isometry, whose other rows are
            zero: I and r then stand for their first rᵢ rows.

    Returns:
        (...), float32 or float64.
    """
    own = R.any(-1, keepdim=True).to(R.dtype)
    chord = torch.linalg.matrix_norm(R - own * torch.eye(R.shape[-1], dtype=R.dtype, device=R.device))
    return torch.rad2deg(2 * torch.asin((chord / (2 * own.sum((-1, -2)).clamp(min=1).sqrt())).clamp(max=1)))


@full_precision
def error_bound(A: Tensor, B: Tensor, weights: Tensor) -> Tensor:
    """Σ wᵢ ‖Bᵢ−B̄‖_F ‖Aᵢ−Ā‖_F of G adapters of one shape, which the aggregation error never exceeds.

    It follows from the triangle inequality on Σ wᵢ (Bᵢ−B̄)(Aᵢ−Ā).

    Args:
        A: (G, N, r, d_in), the factors as they are averaged, float32 or float64.
        B: (G, N, d_out, r), likewise.
        weights: (N,), summing to 1.

    Returns:
        (G,) in float64.
    """
    w = weights.to(A.dtype)[:, None, None]
    A, B = A - A[:, :1], B - B[:, :1]  # so that equal factors leave exactly zero, not rounding
    spread_A, spread_B = (torch.linalg.matrix_norm(F - (w * F).sum(1, keepdim=True)).double() for F in (A, B))
    bound: Tensor = (spread_A * spread_B) @ weights.double()
    return bound
