"""The leading singular triplets by subspace iteration against dense SVDs, and what it leaves to the whole SVD."""

import pytest
import torch

import fedrot
from fedrot.methods import mean_update
from fedrot.methods.mean_update import leading_svd, mean_svd

N, R, D_IN, D_OUT = 30, 4, 90, 70


def factors(spread, dtype=torch.float64, seed=0):
    """Two adapters of clients around common factors."""
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(2, 1, *shape, generator=g, dtype=torch.float64) for shape in ((R, D_IN), (D_OUT, R)))
    A = A + spread * torch.randn(2, N, R, D_IN, generator=g, dtype=torch.float64)
    B = B + spread * torch.randn(2, N, D_OUT, R, generator=g, dtype=torch.float64)
    w = torch.rand(N, generator=g, dtype=torch.float64)
    w[3] = 0
    return A.to(dtype), B.to(dtype), (w / w.sum()).to(dtype)


@pytest.fixture
def whole(monkeypatch):
    """The numbers of adapters that took the whole SVD."""
    taken = []

    def counted(A, *rest):
        taken.append(len(A))
        return mean_svd(A, *rest)

    monkeypatch.setattr(mean_update, "mean_svd", counted)
    return taken


def check(A, B, w, k, tolerance):
    M = torch.einsum("n,gndr,gnre->gde", w.double(), B.double(), A.double())
    U, S, Vt = torch.linalg.svd(M)
    found = leading_svd(A, B, w, k)
    scale = float(S[:, 0].max())
    torch.testing.assert_close(found.sigma[:, :k].double(), S[:, :k], rtol=0, atol=tolerance * scale)
    product = (found.U * found.sigma[:, None, :k]) @ found.Vt
    best = (U[:, :, :k] * S[:, None, :k]) @ Vt[:, :k]
    torch.testing.assert_close(product.double(), best, rtol=0, atol=tolerance * scale)
    for x in (found.U, found.Vt.mT):
        torch.testing.assert_close(x.mT @ x, torch.eye(k, dtype=x.dtype).expand(2, k, k), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("k", [R, 2])
def test_clients_around_a_common_adapter_need_no_whole_svd(whole, k, dtype, tolerance):
    check(*factors(0.1, dtype), k, tolerance)
    assert not whole


def test_updates_without_a_gap_take_the_whole_svd(whole):
    check(*factors(30.0), R, 1e-11)
    assert sum(whole) == 2


def test_each_adapter_is_judged_by_itself(whole):
    near, far = factors(0.1), factors(30.0)
    A, B = (torch.stack([near[i][0], far[i][1]]) for i in (0, 1))
    check(A, B, near[2], R, 1e-11)
    assert whole == [1]


def test_few_rows_take_the_whole_svd(whole):
    A, B, w = factors(0.1)
    leading_svd(A[:, :5], B[:, :5], w[:5], R)
    assert whole == [2]


def test_zero_stays_zero_and_an_overflow_is_told():
    A, B, w = factors(0.1)
    found = leading_svd(A, 0 * B, w, R)
    assert not found.sigma.any() and found.U.isfinite().all() and found.Vt.isfinite().all()
    assert leading_svd(A * 1e200, B * 1e200, w, R) is None


def test_flexlora_of_many_clients_is_the_best_of_its_rank():
    A, B, w = factors(0.1)
    keys = [f"base_model.model.layer{g}.lora_{f}.weight" for g in (0, 1) for f in "AB"]
    updates = [dict(zip(keys, (A[0, n], B[0, n], A[1, n], B[1, n]), strict=True)) for n in range(N)]
    first, again = (fedrot.aggregate(updates, w.tolist(), method="flexlora").state_dict for _ in range(2))
    assert all(torch.equal(first[key], x) for key, x in again.items())
    M = torch.einsum("n,gndr,gnre->gde", w, B, A)
    U, S, Vt = torch.linalg.svd(M)
    for g in (0, 1):
        product = first[keys[2 * g + 1]] @ first[keys[2 * g]]
        torch.testing.assert_close(product, U[g, :, :R] * S[g, :R] @ Vt[g, :R], rtol=1e-9, atol=1e-9)
