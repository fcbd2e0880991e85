"""raFLoRA's weights for rows that few clients have, against its definition block by block in dense float64."""

import pytest
import torch

import fedrot

from ..definitions import assert_same_bits
from ..dense import KIND, SHARES, UNEQUAL, WEIGHTS, best, dense, lora_config, modules
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
