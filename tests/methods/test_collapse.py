"""raFLoRA's weights for rows that few clients have, against its definition block by block in dense float64."""

from dataclasses import replace

import pytest
import torch

import fedrot
from fedrot.methods.collapse import inverse_share

from ..definitions import assert_same_bits
from ..dense import KIND, SHARES, UNEQUAL, WEIGHTS, WIDE, best, dense, lora_config, modules, scaling_of
from ..peft_models import client_updates, factor_keys
from ..ranks.isometries import expected
from ..refusals import refused

CONFIGS = [lora_config(kind) for kind in UNEQUAL]


def by_blocks(unequal, weights=(1.0, 2.0, 5.0)):
    """module → Σ over blocks h of Σ over clients of rank ≥ r_h of N_k/N_h · s_k · the block of B_kA_k."""
    each, total = [modules(kind, u) for kind, u in zip(UNEQUAL, unequal, strict=True)], {}
    for name in each[0]:
        clients = [(w, *m[name]) for w, m in zip(weights, each, strict=True)]
        ranks, start, mean = sorted({len(A) for w, A, _, _ in clients if w}), 0, 0
        for r in ranks:
            having = [c for c in clients if len(c[1]) >= r]
            N_h = sum(w for w, *_ in having)
            mean = mean + sum(w / N_h * s * B[:, start:r] @ A[start:r] for w, A, B, s in having)
            start = r
        total[name] = mean.detach()
    return total


def products(result):
    """module → s·B·A, by the scaling of the widest client, which the result has."""
    return {
        key.split(".lora_A")[0]: 3 / 6**0.5 * result.state_dict[key.replace("lora_A", "lora_B")] @ A
        for key, A in result.state_dict.items()
        if "lora_A" in key
    }


def test_blocks_are_averaged_over_the_clients_that_have_them(unequal):
    options = {"method": "flexlora", "configs": CONFIGS, "collapse": "raflora"}
    result = fedrot.aggregate(unequal, WEIGHTS.tolist(), **options)
    for name, M in by_blocks(unequal).items():
        got = products(result)[name]
        torch.testing.assert_close(got, best(M, 6), rtol=1e-10, atol=1e-10)
        mean = sum(p * dense(k, u)[name] for p, k, u in zip(SHARES, UNEQUAL, unequal, strict=True))
        error = next(a.error for a in result.report.adapters if a.module == name)
        assert 3 / 6**0.5 * error == pytest.approx(float((got - mean).norm()), rel=1e-6)
    whole = fedrot.aggregate(unequal, WEIGHTS.tolist(), energy=1, **options)
    for name, M in by_blocks(unequal).items():
        assert len(whole.state_dict[f"{name}.lora_A.weight"]) == torch.linalg.matrix_rank(M)
    first = fedrot.aggregate(unequal, WEIGHTS.tolist(), **options).state_dict
    assert_same_bits(first, result.state_dict)


def test_a_client_of_no_weight_has_no_row(unequal):
    """The second is the only one of rank 6: what it alone has is not there, and not divided by zero."""
    weights = [1.0, 0.0, 5.0]
    result = fedrot.aggregate(unequal, weights, method="flexlora", configs=CONFIGS, collapse="raflora")
    for name, M in by_blocks(unequal, weights).items():
        torch.testing.assert_close(products(result)[name], best(M, 6), rtol=1e-10, atol=1e-10)


def test_with_equal_ranks_it_is_flexlora(updates):
    options = {"weights": WEIGHTS.tolist(), "method": "flexlora", "configs": lora_config(KIND)}
    plain = fedrot.aggregate(updates, **options)
    result = fedrot.aggregate(updates, collapse="raflora", **options)
    for name, got in dense(KIND, result.state_dict).items():
        torch.testing.assert_close(got, dense(KIND, plain.state_dict)[name], rtol=1e-12, atol=1e-12)


def test_ranks_must_be_configured(updates):
    with refused("client 0 has no LoRA configuration", 'collapse="raflora"', "configs="):
        fedrot.aggregate(updates, method="flexlora", collapse="raflora")


ROTATING = ["fedrot", "fedrot-consensus", "fedrot-least-error", "fedrot-adaptive"]


def test_padded_rows_are_averaged_over_the_clients_that_have_them(unequal):
    """At λ = 0, where rows are the clients' own, this is raFLoRA's definition for both factors."""
    options = {"strength": 0, "collapse": "raflora", "configs": CONFIGS}
    result = fedrot.aggregate(unequal, WEIGHTS.tolist(), method="fedrot", **options)
    each = [modules(kind, u) for kind, u in zip(UNEQUAL, unequal, strict=True)]
    for name in each[0]:
        clients = [(w, *m[name]) for w, m in zip(WEIGHTS.tolist(), each, strict=True)]
        for j in range(6):
            having = [c for c in clients if len(c[1]) > j]
            N_h, s = sum(w for w, *_ in having), 3 / 6**0.5
            A, B = (result.state_dict[f"{name}.lora_{f}.weight"] for f in "AB")
            torch.testing.assert_close(A[j], sum(w / N_h * A[j] for w, A, _, _ in having).detach(), rtol=1e-12, atol=1e-12)
            mean_B = sum(w / N_h * s_k / s * B[:, j] for w, _, B, s_k in having).detach()
            torch.testing.assert_close(B[:, j], mean_B, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [*ROTATING, "flexlora"])
def test_truncations_of_one_adapter_give_it_back(method):
    """Every direction is the same in all clients that have it; a plain mean shrinks those that few have."""
    (update,) = client_updates(WIDE, 1)
    whole = fedrot.aggregate([update], method="flexlora", configs=lora_config(WIDE))
    start, wide = (whole.state_dict, whole.config), dense(WIDE, update)
    configs = [lora_config(replace(WIDE, config=WIDE.config | {"r": r, "lora_alpha": 6 * r / 7})) for r in (2, 4, 7)]
    clients = [(fedrot.truncate(start, config), config) for config in configs]
    options = {"method": method, "reference": start, "align_on": "joint"}
    options |= {"strength": 1} if method.startswith("fedrot") else {}
    result = fedrot.aggregate(clients, WEIGHTS.tolist(), collapse="raflora", **options)
    plain = fedrot.aggregate(clients, WEIGHTS.tolist(), **options)
    for name, product in dense(WIDE, result.state_dict).items():
        torch.testing.assert_close(product, wide[name], rtol=1e-6, atol=1e-6)
        assert (dense(WIDE, plain.state_dict)[name] - wide[name]).norm() > 0.02 * wide[name].norm()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_rotated_clients_count_in_the_directions_that_they_are_put_into(unequal, strength):
    """S⁻¹Ā and B̄S⁻¹ with S = Σ wᵢRᵢᵀRᵢ, the isometries Rᵢ found densely."""
    reference, config = client_updates(WIDE, 1, seed=7)[0], lora_config(WIDE)
    clients = list(zip(unequal, CONFIGS, strict=True))
    options = {"align_on": "A", "strength": strength, "reflections": True}
    result = fedrot.aggregate(clients, WEIGHTS.tolist(), (reference, config), collapse="raflora", **options)
    mean, R = expected(clients, reference, scaling_of(UNEQUAL, WIDE), "A", True, strength, SHARES)
    seen = 0
    for key_A, key_B in factor_keys(reference):
        values, V = torch.linalg.eigh(sum(p * r.T @ r for p, r in zip(SHARES, R[key_A], strict=True)))
        S = V * values.clamp(min=min(SHARES)) @ V.T
        seen += 1
        for key, exact in ((key_A, torch.linalg.inv(S) @ mean[key_A]), (key_B, mean[key_B] @ torch.linalg.inv(S))):
            torch.testing.assert_close(result.state_dict[key], exact, rtol=1e-7, atol=1e-8)
    assert seen == 2


@pytest.mark.parametrize("method", ROTATING)
def test_with_equal_ranks_nothing_changes(updates, method):
    reference = updates[0]
    options = {"weights": WEIGHTS.tolist(), "reference": reference, "method": method, "configs": lora_config(KIND)}
    plain, result = (fedrot.aggregate(updates, collapse=collapse, **options) for collapse in ("none", "raflora"))
    assert_same_bits(result.state_dict, plain.state_dict)
    assert result.report == plain.report


def test_almost_parallel_ranges_are_not_divided_by_next_to_nothing():
    """Two clients of one row, at an angle of 1e-5: the second direction has a share of 2.5e-11, and counts as a half."""
    has = torch.zeros(2, 2, 2, dtype=torch.float64)
    has[0, 0, 0], has[1, 0] = 1, torch.tensor([1.0, 1e-5], dtype=torch.float64)
    inverse = inverse_share(has, [0.5, 0.5])
    assert torch.linalg.eigvalsh(inverse)[-1] <= 2 * (1 + 1e-9)


def test_streams_do_not_know_the_ranks_of_all():
    with refused("fedrot with collapse='raflora' needs all updates", error=ValueError):
        fedrot.FedRotAggregator(collapse="raflora").add({})
