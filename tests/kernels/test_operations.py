"""The operations beside polar: products, averages, low rank, and what surrounds them."""

import pytest
import torch

import fedrot
import fedrot_kernels as fk
from fedrot_kernels import reference


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cross_covariance_and_rotate_average_are_the_definitions(dtype):
    F, F_ref = random(5, 3, 4, 33, dtype=dtype), random(3, 4, 33, seed=1, dtype=dtype)
    weights = torch.tensor([1.0, 0.0, 2.0, 3.0, 0.5])
    M = fk.cross_covariance(F, F_ref)
    R = fk.polar(M)
    mean = fk.rotate_average(F, R, weights)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert (M.dtype, mean.dtype) == (working, working)
    bound = 33 * torch.finfo(working).eps * 10  # d products of numbers below 10
    for g in range(3):
        expected = torch.stack([reference.cross_covariance(F[i, g].double(), F_ref[g].double()) for i in range(5)])
        assert (M[:, g] - expected).abs().max() <= bound
        exact = reference.rotate_average(list(F[:, g].double()), list(R[:, g].double()), weights.tolist())
        assert (mean[g] - exact).abs().max() <= bound
    plain = fk.rotate_average(F, None, weights)
    torch.testing.assert_close(plain, (F.to(working) * (weights / weights.sum()).view(-1, 1, 1, 1)).sum(0).to(working))


def test_wrong_shapes_and_weights_are_named():
    with pytest.raises(ValueError, match=r"must both end in \(r, d\), got \(2, 3\) and \(2, 4\)"):
        fk.cross_covariance(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"weights \(3,\) and F \(2, 1, 4\)"):
        fk.rotate_average(torch.zeros(2, 1, 4), None, torch.ones(3))
    for weights in ([1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="non-negative and not all zero"):
            fk.rotate_average(torch.zeros(2, 1, 4), None, torch.tensor(weights))


@pytest.mark.parametrize(("r", "rank"), [(4, 1), (8, 2), (8, 7), (32, 4)])
def test_a_product_of_low_rank_rotates_only_where_it_says_something(r, rank):
    """In a basis that is no coordinate's, where the rounding of M is all that its null space holds."""
    for seed in range(10):
        B, B_ref = random(rank, r, seed=seed), random(rank, r, seed=seed + 100)
        expected = reference.polar(B.double().T @ B_ref.double())
        R = fk.polar(fk.cross_covariance(B.T, B_ref.T), floor=fk.PRODUCT_FLOOR[torch.float32])
        assert (R - expected).abs().max() <= r * torch.finfo(torch.float32).eps / fk.PRODUCT_FLOOR[torch.float32]
        assert (R.T @ R - torch.eye(r)).abs().max() <= 1e-6


def test_a_floor_costs_nothing_where_the_product_is_determined():
    M = random(50, 8, 8)
    expected = torch.stack([reference.polar(m.double()) for m in M])
    smallest = torch.linalg.svdvals(M)[:, -1].min()
    error, plain = (fk.polar(M, floor=1e-5) - expected).abs().max(), (fk.polar(M) - expected).abs().max()
    assert error <= plain + 8 * torch.finfo(torch.float32).eps / smallest


def test_a_head_of_fewer_classes_than_the_rank_is_not_turned_at_random():
    """Small changes to a shared adapter whose B has rank 2: rotating must not lose more than averaging as it is."""
    worse = []
    for seed in range(10):
        A, B = random(8, 40, seed=seed), random(2, 8, seed=seed + 50)
        updates = [
            {"m.lora_A.weight": A + 0.05 * random(8, 40, seed=s), "m.lora_B.weight": B + 0.05 * random(2, 8, seed=s + 1)}
            for s in range(1000 + seed, 1010 + seed, 2)
        ]
        reference_adapter = {"m.lora_A.weight": A, "m.lora_B.weight": B}
        rotated = fedrot.aggregate(updates, reference=reference_adapter, align_on="B").report
        assert rotated.angle < 5
        worse.append(rotated.error / fedrot.aggregate(updates, method="fedit").report.error)
    assert sum(worse) / len(worse) < 1.1


def test_autocast_of_the_callers_loop_changes_nothing():
    update, other = (
        {"m.lora_A.weight": random(4, 30, seed=s), "m.lora_B.weight": random(20, 4, seed=s + 9)} for s in (0, 1)
    )
    plain, aligned = fedrot.aggregate([update, other]), fedrot.align(update, other)
    M = random(8, 8)
    R = fk.polar(M)
    with torch.autocast("cpu", torch.bfloat16):
        inside, aligned_inside = fedrot.aggregate([update, other]), fedrot.align(update, other)
        assert torch.equal(fk.polar(M), R)
    assert (R.double().T @ R.double() - torch.eye(8)).abs().max() < 1e-6
    assert plain.report == inside.report
    for key in update:
        assert torch.equal(plain.state_dict[key], inside.state_dict[key])
        assert torch.equal(aligned[key], aligned_inside[key])


def test_overflow_is_an_error_that_names_the_client():
    small = {"m.lora_A.weight": random(4, 30), "m.lora_B.weight": random(20, 4)}
    large = {key: x * 1e20 for key, x in small.items()}
    with pytest.raises(fedrot.UpdateError, match="client 1, m: the products of its factors overflow"):
        fedrot.aggregate([small, large], reference=large)
    with pytest.raises(fedrot.UpdateError, match="the update, m: the products of its factors overflow"):
        fedrot.align(large, large)
    half = {key: torch.full_like(x, 60000.0).half() for key, x in small.items()}
    turned = {key: random(*x.shape, seed=3).half() for key, x in small.items()}
    with pytest.raises(fedrot.UpdateError, match=r"overflows torch.float16"):
        fedrot.align(half, turned, strength=1.0)


def test_a_rotation_that_did_not_converge_is_an_error_that_names_the_client(monkeypatch):
    updates = [
        {f"{m}.lora_{f}.weight": random(*shape, seed=s) for m in "mn" for f, shape in (("A", (4, 30)), ("B", (20, 4)))}
        for s in range(3)
    ]
    computed = fk.align_average

    def wrong_by(residual):
        def align_average(*args, **kwargs):
            result = computed(*args, **kwargs)
            result.residual[1, 2] = residual
            return result

        return align_average

    monkeypatch.setattr(fk, "align_average", wrong_by(5e-5))
    fedrot.aggregate(updates, reference=updates[0])
    monkeypatch.setattr(fk, "align_average", wrong_by(2e-4))
    with pytest.raises(fedrot.UpdateError, match=r"client 2, n: its rotation did not converge.* 2.0e-04"):
        fedrot.aggregate(updates, reference=updates[0])


@pytest.mark.parametrize("r", [2, 16, 64])
def test_special_orthogonal_of_rank_one_is_orthogonal(r):
    u, v = torch.linalg.qr(random(r, r, dtype=torch.float64))[0][:, :2].T
    M = torch.outer(u, v).float().expand(4, r, r) * torch.tensor([1.0, -1.0, 1e-9, 1e9]).view(-1, 1, 1)
    R = fk.special_orthogonal(fk.polar(M), M).double()
    assert (R.mT @ R - torch.eye(r, dtype=torch.float64)).abs().max() <= 1e-6
    assert (torch.linalg.det(R) > 0).all()
