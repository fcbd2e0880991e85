"""Square matrices with chosen singular values: the grid on which rotations are tested."""

import torch
from torch import Tensor

RANKS = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64, 128)
CONDITION_NUMBERS = (1.0, 3.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7)


def singular_values(r: int) -> Tensor:
    """(n, r): geometric, one small, one large and half small values for every condition number, and low ranks."""
    rows = []
    for kappa in CONDITION_NUMBERS:
        small = torch.full((r,), 1 / kappa, dtype=torch.float64)
        one_small, one_large, half = torch.ones_like(small), small.clone(), small.clone()
        one_small[-1], one_large[0], half[: (r + 1) // 2] = 1 / kappa, 1, 1
        geometric = kappa ** (-torch.arange(r, dtype=torch.float64) / max(r - 1, 1))
        rows += [geometric, one_small, one_large, half]
    for rank in {0, 1, r // 2, r - 1}:
        rows.append((torch.arange(r) < rank).double())
    return torch.stack(rows)


def orthogonal(n: int, r: int, generator: torch.Generator) -> Tensor:
    """(n, r, r) Haar-distributed orthogonal matrices, float64."""
    Q, R = torch.linalg.qr(torch.randn(n, r, r, dtype=torch.float64, generator=generator))
    return Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def with_singular_values(S: Tensor, seed: int) -> Tensor:
    """(n, r) -> (n, r, r), float64, singular vectors at random, determinants of either sign."""
    generator = torch.Generator().manual_seed(seed)
    return (orthogonal(*S.shape, generator) * S[:, None, :]) @ orthogonal(*S.shape, generator)


def orthogonality(R: Tensor) -> float:
    """The largest ‖RᵀR − I‖_max of a batch, computed in float64."""
    R = R.double()
    return (R.mT @ R - torch.eye(R.shape[-1], dtype=torch.float64)).abs().max().item()


def procrustes_gap(M: Tensor, R: Tensor) -> float:
    """The largest (‖M‖_* − tr RᵀM) / ‖M‖_* of a batch, computed in float64; 0 for M = 0."""
    M = M.double() / M.double().abs().amax((-1, -2), keepdim=True).clamp_min(1e-300)
    nuclear = torch.linalg.svdvals(M).sum(-1)
    gap = nuclear - (R.double() * M).sum((-1, -2))
    return (gap / nuclear.clamp_min(1e-300)).max().item()
