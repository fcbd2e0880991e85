"""What averaging factors loses and how far clients were rotated."""

import torch
from torch import Tensor

from .precision import full_precision

_COLUMNS = 256  # of the error formed at a time, where that is cheaper than Gram matrices


@full_precision
def aggregation_error(A: Tensor, B: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """‖Σ wᵢBᵢAᵢ − B̄Ā‖_F and ‖Σ wᵢBᵢAᵢ‖_F of G adapters of one shape, without a d_out × d_in matrix.

    Uses Σ wᵢBᵢAᵢ − B̄Ā = Σ wᵢ (Bᵢ−B̄)(Aᵢ−Ā) = S_B S_A, hence ‖S_B S_A‖² = Σ (S_BᵀS_B) ∘ (S_A S_Aᵀ), two Gram matrices
    of N·r rows; or, where there are so many clients that this is more work, S_B S_A itself a few columns at a time.

    Args:
        A: (G, N, r, d_in), the factors as they are averaged, float32 or float64.
        B: (G, N, d_out, r).
        weights: (N,), summing to 1.

    Returns:
        The errors and the norms of the mean update B·A (the scaling s is left out of both), each (G,) in float64.
    """
    d_in, d_out, k = A.shape[-1], B.shape[-2], A.shape[1] * A.shape[2]
    S_A, S_B = _centred(A, weights), _centred(B.mT, weights).mT
    if k * (d_in + d_out) <= d_in * d_out:
        products = ((S_B.mT @ S_B) * (S_A @ S_A.mT)).double()
        error, update = products[:, :k, :k].sum((1, 2)), products.sum((1, 2))
    else:
        error, update = torch.zeros((2, len(A)), dtype=torch.float64, device=A.device)
        for columns in S_A.split(_COLUMNS, dim=2):
            E = S_B[..., :k] @ columns[:, :k]
            error = error + E.double().square().sum((1, 2))
            update = update + (E + S_B[..., k:] @ columns[:, k:]).double().square().sum((1, 2))
    return error.clamp(min=0).sqrt(), update.clamp(min=0).sqrt()


@full_precision
def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """‖B A‖_F, (G,), of B (G, d_out, K) and A (G, K, d_in): by Gram matrices, unless B A is the smaller matrix.

    By Gram matrices, a norm that is small beside ‖B‖‖A‖ loses half the digits of the dtype.
    """
    (d_out, k), d_in = B.shape[1:], A.shape[2]
    if d_out * d_in <= k * (d_out + d_in):
        return torch.linalg.matrix_norm(B @ A)
    return ((B.mT @ B) * (A @ A.mT)).sum((1, 2)).clamp(min=0).sqrt()


def _centred(F: Tensor, weights: Tensor) -> Tensor:
    """(G, N·r + r, d): √wᵢ (Fᵢ − F̄) of every client, and F̄, with which Σ wᵢBᵢAᵢ is complete; F (G, N, r, d)."""
    w = weights.to(F.dtype)
    mean = torch.einsum("n,gnrd->grd", w, F)
    S = F.new_empty(len(F), F.shape[1] + 1, *F.shape[2:])
    torch.sub(F, mean[:, None], out=S[:, :-1])
    S[:, :-1] *= w.sqrt()[:, None, None]
    S[:, -1] = mean
    return S.flatten(1, 2)


def rotation_angle(R: Tensor) -> Tensor:
    """How far R rotates, in degrees: 2 arcsin(‖R − I‖_F / (2√r)), 0 for I and 180 for −I.

    It is the angle by which turning every direction would move the frame as far as R does (in the root mean square).

    Args:
        R: (..., r, r), orthogonal; of a client of smaller rank rᵢ a partial isometry, its other rows zero: then I and r
            stand for their first rᵢ rows.

    Returns:
        (...), float32 or float64.
    """
    own = R.any(-1, keepdim=True).to(R.dtype)
    chord = torch.linalg.matrix_norm(R - own * torch.eye(R.shape[-1], dtype=R.dtype, device=R.device))
    return torch.rad2deg(2 * torch.asin((chord / (2 * own.sum((-1, -2)).clamp(min=1).sqrt())).clamp(max=1)))


@full_precision
def error_bound(A: Tensor, B: Tensor, weights: Tensor) -> Tensor:
    """Σ wᵢ ‖Bᵢ−B̄‖_F ‖Aᵢ−Ā‖_F of G adapters of one shape, which no aggregation error of averaged factors exceeds.

    By the triangle inequality on Σ wᵢ (Bᵢ−B̄)(Aᵢ−Ā).

    Args:
        A: (G, N, r, d_in), the factors as they are averaged, float32 or float64.
        B: (G, N, d_out, r).
        weights: (N,), summing to 1.

    Returns:
        (G,) in float64.
    """
    w = weights.to(A.dtype)[:, None, None]
    A, B = A - A[:, :1], B - B[:, :1]  # of which equal factors leave nothing, not even rounding
    spread_A, spread_B = (torch.linalg.matrix_norm(F - (w * F).sum(1, keepdim=True)).double() for F in (A, B))
    return (spread_A * spread_B) @ weights.double()
