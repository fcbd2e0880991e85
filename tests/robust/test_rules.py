"""Krum, multi-Krum and the geometric median, against their definitions on dense updates, and in any basis of any client."""

import pytest
import torch

import fedrot
from fedrot.robust.rules import krum_scores, median_weights

from ..definitions import assert_same_bits
from ..dense import KIND, mean_update, modules
from ..peft_models import KINDS, client_updates, factor_keys
from .rounds import HEAD, attacked, honest, pairs, turned, vectors

RULES = ["krum", "multi-krum", "geometric-median"]
WEIGHTS = [1.0, 2.0, 5.0, 1.5, 1.0, 3.0, 2.0, 1.0, 1.0]


def without_heads(clients):
    return [{key: x for key, x in client.items() if "lora_" in key} for client in clients]


def chosen(clients, **options):
    report = fedrot.aggregate(pairs(clients), WEIGHTS[: len(clients)], report_error=False, **options).report
    return report.choice


@pytest.mark.parametrize("f", [0, 1, 2, 3])
def test_krum_is_its_definition(f):
    clients = without_heads(attacked(9, 3))
    X = vectors(clients, heads=False)
    scores = []
    for i, x in enumerate(X):
        others = sorted(float((x - y).square().sum()) for j, y in enumerate(X) if j != i)
        scores.append(sum(others[: 9 - f - 2]))
    krum, multi = (chosen(clients, robust=rule, byzantine=f) for rule in RULES[:2])
    assert krum.scores == pytest.approx(scores, rel=1e-10) and multi.scores == krum.scores
    order = sorted(range(9), key=lambda i: scores[i])
    assert [i for i, w in enumerate(krum.weights) if w] == order[:1] and krum.weights[order[0]] == 1
    total = sum(WEIGHTS[i] for i in order[: 9 - f])
    expected = [WEIGHTS[i] / total if i in order[: 9 - f] else 0 for i in range(9)]
    assert multi.weights == pytest.approx(expected, rel=1e-12)
    assert set(multi.refused) == {f"client {i}" for i in order[9 - f :]}


def test_the_geometric_median_minimises_the_sum_of_distances():
    clients = without_heads(attacked(9, 4))
    X, w = vectors(clients, heads=False), torch.tensor(WEIGHTS, dtype=torch.float64)
    weights = torch.tensor(chosen(clients, robust="geometric-median").weights, dtype=torch.float64)
    z = weights @ X
    directions = (X - z) / (X - z).norm(dim=1, keepdim=True)
    # The gradient of Σ wᵢ‖xᵢ − z‖, which is convex.
    assert float((w @ directions).norm()) < 1e-8 * float(w.sum())
    assert float(weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spread", [0.3, 1e-3])
def test_no_basis_of_a_client_changes_its_weight(rule, spread):
    clients = honest(8, spread)
    first = chosen(clients, robust=rule)
    assert len(set(first.weights)) > 1
    for seed in range(3):
        again = chosen(turned(clients, seed), robust=rule)
        assert again.weights == pytest.approx(first.weights, abs=1e-6)
        assert again.refused.keys() == first.refused.keys()
        # A squared distance is known to the rounding of the squared updates, in bases of condition numbers up to 30.
        assert torch.tensor(again.distances).sub(torch.tensor(first.distances)).abs().max() < 1e-7 * max(first.distances[0])


@pytest.mark.parametrize("rule", RULES)
def test_float32_clients_in_other_bases_have_nearly_the_same_weights(rule):
    """Rounding BG and G⁻¹A moves the updates themselves by 1e-7 times the condition number of G."""
    clients = honest(8, kind=KINDS["modules to save"])
    config = KINDS["modules to save"]
    found = [
        fedrot.aggregate(pairs(c, config), robust=rule, report_error=False).report.choice.weights
        for c in (clients, turned(clients, condition=3))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_clients_that_agree_but_for_their_bases_are_one(rule):
    clients = turned(honest(1) * 7)
    choice = chosen(clients, robust=rule)
    assert not any(map(any, choice.distances))
    expected = {"krum": [1, 0, 0], "multi-krum": [1 / 10.5, 2 / 10.5, 5 / 10.5], "geometric-median": [1 / 15.5, 2 / 15.5]}
    assert list(choice.weights[: len(expected[rule])]) == pytest.approx(expected[rule])


@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("method", ["flexlora", "fedex-lora", "flora"])
def test_the_result_is_the_mean_of_the_updates_by_the_rules_weights(rule, method):
    clients = attacked(7, 2)
    result = fedrot.aggregate(pairs(clients), robust=rule, method=method)
    choice = result.report.choice
    assert result.report.clients == tuple(c for c, w in zip(choice.clients, choice.weights, strict=True) if w)
    expected = mean_update([KIND] * 7, clients, choice.weights)
    if method == "flexlora":
        for name, (A, B, s) in modules(KIND, result.state_dict).items():
            U, S, Vh = torch.linalg.svd(expected[name])
            torch.testing.assert_close(s * B @ A, U[:, :4] * S[:4] @ Vh[:4], rtol=1e-9, atol=1e-9)
    else:
        base = result.base_update
        for (a, b), name in zip(factor_keys(base), expected, strict=True):
            found = base[b] @ base[a]
            if method == "fedex-lora":
                A, B, s = modules(KIND, result.state_dict)[name]
                found = found + s * B @ A
            torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-9)
    head = sum(w * c[HEAD] for w, c in zip(choice.weights, clients, strict=True))
    torch.testing.assert_close(result.state_dict[HEAD], head)


@pytest.mark.parametrize("method", [name for name, m in fedrot.METHODS.items() if name != "fedsa-lora"])
def test_every_method_that_averages_updates_takes_them(method):
    clients = attacked(9, 3)
    if fedrot.METHODS[method].needs_shared_start:
        for client in clients:
            client.update({a: clients[0][a] for a, _ in factor_keys(client)})
    reference = client_updates(KIND, 1, 99)[0] if not fedrot.METHODS[method].needs_shared_start else clients[0]
    options = {"method": method, "report_error": True, "round": 0}
    robust = fedrot.aggregate(pairs(clients), reference=pairs([reference])[0], robust="multi-krum", **options)
    assert set(robust.report.choice.refused) == {"client 6", "client 7", "client 8"}
    plain = fedrot.aggregate(pairs(clients[:6]), reference=pairs([reference])[0], **options)
    assert_same_bits(robust.state_dict, plain.state_dict)
    assert robust.report.weights == plain.report.weights and robust.report.adapters == plain.report.adapters


def test_a_client_of_weight_zero_is_neither_compared_nor_counted():
    clients = attacked(8, 2)
    weights = [1.0] * 7 + [0.0]
    choice = fedrot.aggregate(pairs(clients), weights, robust="krum", byzantine=2).report.choice
    assert choice.clients == tuple(f"client {i}" for i in range(7)) and choice.byzantine == 2


def test_the_same_inputs_give_the_same_bits():
    first, second = (fedrot.aggregate(pairs(attacked(7, 2)), robust="geometric-median") for _ in range(2))
    assert_same_bits(first.state_dict, second.state_dict)
    assert first.report == second.report


def test_what_attackers_gain_from_size_has_a_bound():
    """An attacker 1e6 times further away has 1e-6 of the weight, so that it moves the median no further."""
    moves = []
    for scale in (-1e2, -1e5, -1e8):
        X = vectors(attacked(9, 4, scale), heads=False)
        squares = torch.stack([(X - x).square().sum(1) for x in X])
        z = median_weights(squares, torch.full((9,), 1 / 9, dtype=torch.float64)) @ X
        moves.append(float((z - X[:5].mean(0)).norm()))
        assert krum_scores(squares, 3).argmin() < 5
    assert moves[2] == pytest.approx(moves[1], rel=1e-3) and moves[1] < 3 * float(X[:5].norm(dim=1).max())
