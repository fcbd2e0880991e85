"""FLoRA-NA's weights against dense least squares in float64."""

import pytest
import torch

import fedrot
from fedrot.methods import flora_na

from ..definitions import assert_same_bits
from ..dense import KIND, SHARES, UNEQUAL, WEIGHTS, dense, lora_config, mean_update, modules, with_frozen
from ..peft_models import KINDS, client_updates, factor_keys
from ..refusals import refused

CONFIGS = [lora_config(kind) for kind in UNEQUAL]


def dense_als(A, B, M, shares, steps):
    """B̂Â by alternating least squares on matrices of d_out × d_in, the solutions nearest the weights before."""
    p = q = torch.tensor(shares, dtype=torch.float64)
    for _ in range(steps):
        for side in "AB":
            mean = sum(c * F for c, F in zip(q if side == "A" else p, B if side == "A" else A, strict=True))
            terms = torch.stack([(mean @ F if side == "A" else F @ mean).flatten() for F in (A if side == "A" else B)], 1)
            x = p if side == "A" else q
            x = x + torch.linalg.lstsq(terms, M.flatten() - terms @ x, driver="gelsd", rcond=1e-10).solution
            p, q = (x, q) if side == "A" else (p, x)
    return sum(c * F for c, F in zip(q, B, strict=True)) @ sum(c * F for c, F in zip(p, A, strict=True))


def test_the_weights_are_those_of_dense_least_squares(updates, monkeypatch):
    monkeypatch.setattr(flora_na, "STEPS", 7)
    monkeypatch.setattr(flora_na, "CONVERGED", -1.0)
    result = fedrot.aggregate(updates, WEIGHTS.tolist(), method="flora-na")
    for name, M in mean_update([KIND] * 3, updates).items():
        A, B = ([u[f"{name}.lora_{f}.weight"] for u in updates] for f in "AB")
        expected = 2 * dense_als(A, B, M / 2, SHARES, 7)
        torch.testing.assert_close(dense(KIND, result.state_dict)[name], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("clients", [2, 3, 9])
def test_the_end_is_a_minimum_below_fedit(clients):
    updates = client_updates(KIND, clients)
    result, plain = (fedrot.aggregate(updates, method=method, report_error=True) for method in ("flora-na", "fedit"))
    for name, M in mean_update([KIND] * clients, updates, [1 / clients] * clients).items():
        A, B, s = modules(KIND, result.state_dict)[name]
        E = M / s - (B @ A).detach()
        for u in updates:  # the gradients by every p and every q
            for term in (B @ u[f"{name}.lora_A.weight"], u[f"{name}.lora_B.weight"] @ A):
                assert abs((E * term.detach()).sum()) < 1e-4 * E.norm() * term.norm()
    for a, b in zip(result.report.adapters, plain.report.adapters, strict=True):
        assert a.error < b.error


def test_what_fedit_does_without_loss_it_does_too(updates):
    """With A in common the weights of B are those of the mean, whose error is 0."""
    updates = with_frozen(updates, "A")
    result = fedrot.aggregate(updates, WEIGHTS.tolist(), method="flora-na")
    for name, M in mean_update([KIND] * 3, updates).items():
        torch.testing.assert_close(dense(KIND, result.state_dict)[name], M, rtol=1e-9, atol=1e-9)


def test_clients_without_a_weight_have_no_part(updates):
    weights = [1.0, 0.0, 3.0]
    result = fedrot.aggregate(updates, weights, method="flora-na").state_dict
    other = [updates[0], *client_updates(KIND, 1, seed=9), updates[2]]
    torch.testing.assert_close(fedrot.aggregate(other, weights, method="flora-na").state_dict, result, rtol=1e-5, atol=1e-6)


def test_unequal_ranks(unequal):
    result, plain = (
        fedrot.aggregate(unequal, WEIGHTS.tolist(), method=method, configs=CONFIGS) for method in ("flora-na", "flexlora")
    )
    mean = mean_update(UNEQUAL, unequal)
    for a in result.report.adapters:
        B, A = (result.state_dict[f"{a.module}.lora_{f}.weight"] for f in "BA")
        s = 3 / 6**0.5
        assert s * a.error == pytest.approx(float((mean[a.module] - s * B @ A).norm()), rel=1e-6)
    assert plain.report.error < result.report.error  # the least of all factors of the rank
    assert result.report.relative_error < 1


@pytest.mark.parametrize("name", ["linear", "convolution", "embedding", "DoRA", "LoRA bias", "bfloat16"])
def test_kinds(name):
    updates = client_updates(KINDS[name], 3)
    result, plain = (fedrot.aggregate(updates, method=method, report_error=True) for method in ("flora-na", "fedit"))
    factors = {key for pair in factor_keys(updates[0]) for key in pair}
    assert all(torch.equal(result.state_dict[key], plain.state_dict[key]) for key in updates[0].keys() - factors)
    assert all(result.state_dict[key].shape == updates[0][key].shape for key in factors)
    assert result.report.error < plain.report.error


def test_sizes_do_not_matter_and_overflow_is_named():
    updates = client_updates(KIND, 3)
    result = fedrot.aggregate(updates, method="flora-na").state_dict
    large = [{key: x * 1e120 if "lora" in key else x for key, x in u.items()} for u in updates]
    for key, x in fedrot.aggregate(large, method="flora-na", report_error=False).state_dict.items():
        torch.testing.assert_close(x / (1e120 if "lora" in key else 1), result[key], rtol=1e-6, atol=1e-9)
    huge = [{key: x * 1e160 for key, x in u.items()} for u in updates]
    with refused("overflows"):
        fedrot.aggregate(huge, method="flora-na", report_error=False)


def test_zero_clients_give_zero():
    updates = [{key: torch.zeros_like(x) for key, x in u.items()} for u in client_updates(KIND, 2)]
    assert not any(x.any() for x in fedrot.aggregate(updates, method="flora-na").state_dict.values())


def test_the_same_inputs_give_the_same_bits(updates):
    first, again = (fedrot.aggregate(updates, method="flora-na").state_dict for _ in range(2))
    assert_same_bits(first, again)
