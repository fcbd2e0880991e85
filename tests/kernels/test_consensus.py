"""The consensus of clients on factors and on Gram matrices, in float64: it converges, adapter by adapter."""

from itertools import pairwise

import pytest
import torch

from fedrot_kernels import reference
from fedrot_kernels.groupwise import consensus as consensus_module
from fedrot_kernels.groupwise.consensus import consensus
from fedrot_kernels.groupwise.gram import Grams

from .groups import HARD, SHARES, N, clients, hard_clients, spread
from .spectra import orthogonal


@pytest.mark.parametrize("uses", [0, 10**6], ids=["factors", "Gram matrices"])
def test_no_sweep_of_the_consensus_raises_the_spread(uses):
    (A,), (B,), *_ = clients(shapes=[(8, 40, 24)])
    grams = Grams([A], [B], SHARES, uses)
    R = torch.eye(8, dtype=torch.float64).expand(1, N, -1, -1)
    spreads = [spread(A, B, R[0])]
    for _ in range(12):
        R = consensus(grams, R, reflections=False, floor=0, sweeps=1)
        spreads.append(spread(A, B, R[0]))
    assert all(after <= before + 1e-12 for before, after in pairwise(spreads))
    assert spreads[-1] < 0.7 * spreads[0]
    best = torch.stack([reference.special_orthogonal(M) for M in _towards_mean(A, B, R[0])])
    # A fixed point: every client is as close as it can come to the others' mean.
    assert spread(A, B, best) > spreads[-1] * (1 - 1e-6)


def _towards_mean(A, B, R, shares=SHARES):
    w, M = shares[:, None, None], 0
    for F in (A, B.mT):
        F = F / (w * F.square()).sum().sqrt()
        M = M + F @ (w * R.mT @ F).sum(0).T
    return M


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize(("n", "r", "noise"), HARD)
def test_the_consensus_has_converged_on_hard_data(n, r, noise, reflections, monkeypatch):
    A, B, shares = hard_clients(n, r, noise, reflections=reflections)
    grams = Grams(A, B, shares, 10**6)
    start = torch.eye(r, dtype=torch.float64).expand(8, n, -1, -1)
    options = {"reflections": reflections, "floor": 0}
    found = consensus(grams, start, **options)
    monkeypatch.setattr(consensus_module, "CONSENSUS", 0)
    longer = consensus(grams, start, **options, sweeps=200 if r > 16 else 2000)
    for i in range(8):
        reached, best = (float(spread(A[i], B[i], R[i], shares)) for R in (found, longer))
        assert reached <= best * (1 + 1e-6) + 1e-12


def test_what_an_adapter_becomes_does_not_depend_on_the_others():
    A, B, shares = hard_clients(10, 8, 2.0, reflections=False)
    start = torch.eye(8, dtype=torch.float64).expand(8, 10, -1, -1)
    options = {"reflections": False, "floor": 0}
    together = consensus(Grams(A, B, shares, 10**6), start, **options)
    for i in (0, 5):
        alone = consensus(Grams(A[i : i + 1], B[i : i + 1], shares, 10**6), start[:1], **options)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-9)


def test_one_client_and_clients_without_weight():
    A, B, shares = hard_clients(4, 8, 0.3, reflections=False)
    start = orthogonal(32, 8, torch.Generator().manual_seed(3))
    start[..., 0] *= torch.linalg.det(start).sign()[:, None]
    start, shares = start.view(8, 4, 8, 8), torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    R = consensus(Grams(A, B, shares, 10**6), start, reflections=False, floor=0)
    torch.testing.assert_close(R[:, 1], start[:, 1], rtol=0, atol=1e-9)  # nothing to turn towards
    for i in range(8):
        best = torch.stack([reference.special_orthogonal(M) for M in _towards_mean(A[i], B[i], R[i], shares)])
        torch.testing.assert_close(R[i], best, rtol=0, atol=1e-6)  # the others stand as near to it as they can
