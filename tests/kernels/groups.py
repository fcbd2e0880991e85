"""Clients that are aligned to each other, in bases of their own, and what averaging them loses, by its definition."""

import torch

from .spectra import orthogonal

SHAPES = [(4, 33, 20), (4, 9, 64), (1, 7, 5), (8, 40, 24)]
WEIGHTS = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0], dtype=torch.float64)
SHARES = WEIGHTS / WEIGHTS.sum()
N = len(WEIGHTS)


def clients(seed=0, drift=0.5, dtype=torch.float64, shapes=SHAPES, turned=True, n=N):
    """Per adapter A (n, r, d_in), B (n, d_out, r) and a reference: clients near it, each in a basis of its own."""
    generator = torch.Generator().manual_seed(seed)
    A, B, A_ref, B_ref = [], [], [], []
    for r, d_in, d_out in shapes:
        a, b, *drifts = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((r, d_in), (d_out, r), (n, r, d_in), (n, d_out, r))
        )
        Q = orthogonal(n, r, generator)
        Q[..., 0] *= torch.linalg.det(Q).sign()[:, None]
        Q = Q if turned else torch.eye(r, dtype=torch.float64).expand(n, -1, -1)
        A.append((Q.mT @ (a + drift * drifts[0])).to(dtype))
        B.append(((b + drift * drifts[1]) @ Q).to(dtype))
        A_ref.append(a.to(dtype))
        B_ref.append(b.to(dtype))
    return A, B, A_ref, B_ref


def lost(A, B, R):
    """‖Σ wᵢBᵢAᵢ − B̄Ā‖_F of one adapter, by its definition."""
    w = SHARES[:, None, None]
    return torch.linalg.norm((w * B @ A).sum(0) - (w * B @ R).sum(0) @ (w * R.mT @ A).sum(0))


def spread(A, B, R, shares=SHARES):
    """What generalised Procrustes lowers: Σ wᵢ‖RᵢᵀFᵢ − F̄‖², both factors scaled to one size."""
    w, total = shares[:, None, None], 0.0
    for F in (A, B.mT):
        F = R.mT @ F / (w * F.square()).sum().sqrt()
        total += (w * (F - (w * F).sum(0)).square()).sum()
    return total


HARD = [(3, 1, 1.0), (3, 4, 0.3), (10, 8, 2.0), (50, 4, 2.0), (10, 16, 1.5), (4, 64, 0.7)]


def hard_clients(n, r, noise, *, reflections):
    """Eight adapters of one shape: n clients in bases at random, noise of this many times the signal, unequal weights."""
    generator, d = torch.Generator().manual_seed(5), max(64, 2 * r)
    shares = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    Q = orthogonal(8 * n, r, generator)
    if not reflections:
        Q[..., 0] *= torch.linalg.det(Q).sign()[:, None]
    frames = []
    for width in (d, d // 2):
        common = torch.randn(8, 1, r, width, generator=generator, dtype=torch.float64)
        F = common + noise * torch.randn(8, n, r, width, generator=generator, dtype=torch.float64)
        frames.append(Q.view(8, n, r, r).mT @ F)
    return frames[0], frames[1].mT.contiguous(), shares / shares.sum()
