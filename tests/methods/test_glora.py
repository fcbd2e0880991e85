"""GLoRA against the mean of dense projectors in float64."""

import pytest
import torch

import fedrot
from fedrot.methods.glora import common_subspace

from ..definitions import assert_same_bits
from ..dense import KIND, SHARES, UNEQUAL, WEIGHTS, best, dense, lora_config, mean_update, modules
from ..peft_models import KINDS, client_updates, factor_keys
from ..refusals import refused
from .test_factorised import orthogonal

CONFIGS = [lora_config(kind) for kind in UNEQUAL]


def projector(B):
    Q, _ = torch.linalg.qr(B)
    return Q @ Q.T


def subspace(Bs, R, shares=SHARES):
    """The projector onto the leading eigenvectors of the mean projector."""
    _, vectors = torch.linalg.eigh(sum(p * projector(B) for p, B in zip(shares, Bs, strict=True)))
    U = vectors[:, -R:]
    return U @ U.T


def glora(updates, configs=CONFIGS, **options):
    return fedrot.aggregate(updates, WEIGHTS.tolist(), method="glora", configs=configs, **options)


@pytest.mark.parametrize("R", [2, 5, None])
def test_the_result_is_the_mean_in_the_common_subspace(unequal, R):
    """The clients have 2, 6 and 3 or 5 columns of 16 rows."""
    result, mean = glora(unequal, server_rank=R), mean_update(UNEQUAL, unequal)
    for name, M in mean.items():
        Bs = [modules(kind, u)[name][1].detach() for kind, u in zip(UNEQUAL, unequal, strict=True)]
        A, B = (result.state_dict[f"{name}.lora_{f}.weight"] for f in "AB")
        s = 3 / 6**0.5
        expected = subspace(Bs, R or 6) @ M
        torch.testing.assert_close(s * B @ A, expected, rtol=1e-9, atol=1e-9)
        S = torch.linalg.svdvals(expected)[: R or 6] / s
        torch.testing.assert_close(A @ A.T, torch.diag(S), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(B.T @ B, torch.diag(S), rtol=1e-9, atol=1e-9)


def test_with_all_directions_it_is_exact(unequal):
    result = glora(unequal, server_rank=13)
    assert result.report.relative_error < 1e-7
    for name, M in mean_update(UNEQUAL, unequal).items():
        A, B = (result.state_dict[f"{name}.lora_{f}.weight"] for f in "AB")
        torch.testing.assert_close(3 / 6**0.5 * B @ A, M, rtol=1e-10, atol=1e-10)


def test_no_clients_basis_matters(updates):
    """Each client's factors by an invertible matrix of its own: B T⁻¹, T A."""
    options = {"method": "glora", "weights": WEIGHTS.tolist()}
    expected = dense(KIND, fedrot.aggregate(updates, **options).state_dict)
    there = [dict(u) for u in updates]
    for i, update in enumerate(there):
        for j, (key_A, key_B) in enumerate(factor_keys(update)):
            T = orthogonal(4, seed=10 * i + j) @ torch.diag(torch.tensor([0.01, 1.0, 3.0, 100.0], dtype=torch.float64))
            update[key_A], update[key_B] = T @ update[key_A], update[key_B] @ torch.linalg.inv(T)
    found = dense(KIND, fedrot.aggregate(there, **options).state_dict)
    assert expected
    for name, product in expected.items():
        torch.testing.assert_close(found[name], product, rtol=1e-8, atol=1e-8)


def test_columns_of_zero_and_copies_span_nothing():
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(1, 2, 12, 3, generator=generator, dtype=torch.float64)
    B[0, 0, :, 2] = B[0, 0, :, 0] + B[0, 0, :, 1]
    B[0, 1, :, 1:] = 0
    w = torch.tensor([0.25, 0.75], dtype=torch.float64)
    U = common_subspace(B, w, 3)
    expected = subspace([B[0, 0, :, :2], B[0, 1, :, :1]], 3, w.tolist())
    torch.testing.assert_close(U[0] @ U[0].T, expected, rtol=1e-12, atol=1e-12)


def test_a_client_gets_the_best_update_of_its_rank(unequal):
    result = glora(unequal, server_rank=9)
    whole = {
        name: 3 / 6**0.5 * result.state_dict[f"{name}.lora_B.weight"] @ result.state_dict[f"{name}.lora_A.weight"]
        for name in mean_update(UNEQUAL, unequal)
    }
    for kind in UNEQUAL:
        own = fedrot.truncate((result.state_dict, result.config), lora_config(kind))
        for name, got in dense(kind, own).items():
            torch.testing.assert_close(got, best(whole[name], len(modules(kind, own)[name][0])), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["linear", "convolution", "embedding", "DoRA", "LoRA bias", "bfloat16"])
def test_kinds(name):
    """Heads, magnitudes and biases are averaged as by plain averaging, and the error is not above the update."""
    kind = KINDS[name]
    updates = client_updates(kind, 3)
    result, plain = (fedrot.aggregate(updates, method=method) for method in ("glora", "fedit"))
    factors = {key for pair in factor_keys(updates[0]) for key in pair}
    assert all(torch.equal(result.state_dict[key], plain.state_dict[key]) for key in updates[0].keys() - factors)
    assert all(result.state_dict[key].shape == updates[0][key].shape for key in factors)
    assert 0 < result.report.relative_error < 1


def test_an_overflow_is_named():
    updates = [{key: x.float() * 1e25 for key, x in u.items()} for u in client_updates(KIND, 2)]
    with refused("overflows"):
        fedrot.aggregate(updates, method="glora")


def test_the_same_inputs_give_the_same_bits(unequal):
    assert_same_bits(glora(unequal).state_dict, glora(unequal).state_dict)
