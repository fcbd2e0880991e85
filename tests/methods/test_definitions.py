"""Every method against its definition in dense float64 arithmetic, with adapters that PEFT made."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import fedrot
from fedrot import METHODS, FedRotAggregator
from fedrot.methods.registry import make_method
from fedrot.options import AggregationOptions

from ..definitions import assert_same_bits
from ..dense import KIND, UNEQUAL, WEIGHTS, base_change, dense, lora_config, mean_update, modules, with_frozen
from ..peft_models import KINDS, client_updates, factor_keys, turned_clients
from ..streams import STREAMING

close = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.parametrize(("method", "round", "frozen"), [("ffa-lora", 3, "A"), ("rolora", 0, "A"), ("rolora", 1, "B")])
def test_with_a_frozen_factor_the_mean_is_the_mean_update(updates, method, round, frozen):
    updates = with_frozen(updates, frozen)
    result = fedrot.aggregate(updates, WEIGHTS.tolist(), method=method, round=round)
    expected = mean_update([KIND] * 3, updates)
    for name, update in dense(KIND, result.state_dict).items():
        torch.testing.assert_close(update, expected[name], **close)
    for pair in factor_keys(updates[0]):
        key = pair["AB".index(frozen)]
        assert torch.equal(result.state_dict[key], updates[0][key])
    assert result.report.relative_error < 1e-7


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_what_goes_into_the_base_makes_the_update_exact(unequal, method):
    result = fedrot.aggregate(unequal, WEIGHTS.tolist(), method=method, configs=[lora_config(k) for k in UNEQUAL])
    expected = mean_update(UNEQUAL, unequal)
    ranks = {name: max(modules(k, u)[name][0].shape[0] for k, u in zip(UNEQUAL, unequal, strict=True)) for name in expected}
    changed = base_change(result)
    for key_A, key_B in factor_keys(result.state_dict):
        name = re.sub(r"\.lora_A.*", "", key_A)
        A, B = result.state_dict[key_A], result.state_dict[key_B]
        assert len(A) == ranks[name]
        widest = next(m[name] for k, u in zip(UNEQUAL, unequal, strict=True) if len((m := modules(k, u))[name][0]) == len(A))
        torch.testing.assert_close(changed[name] + widest[2] * B @ A, expected[name], **close)
    assert result.report.relative_error < 1e-7


def test_fedex_continues_from_the_mean_factors(updates):
    result = fedrot.aggregate(updates, WEIGHTS.tolist(), method="fedex-lora", configs=lora_config(KIND))
    plain = fedrot.aggregate(updates, WEIGHTS.tolist(), method="fedit")
    torch.testing.assert_close(result.state_dict, plain.state_dict, **close)


def test_flora_begins_anew_as_peft_does(updates):
    first = fedrot.aggregate(updates, method="flora", configs=lora_config(KIND)).state_dict
    again = fedrot.aggregate(updates, method="flora", configs=lora_config(KIND)).state_dict
    later = fedrot.aggregate(updates, method="flora", configs=lora_config(KIND), round=1).state_dict
    for key_A, key_B in factor_keys(first):
        A, bound = first[key_A], first[key_A].shape[1] ** -0.5
        assert torch.equal(A, again[key_A]) and not torch.equal(A, later[key_A])
        assert first[key_B].abs().max() == 0
        fresh = nn.init.kaiming_uniform_(torch.empty(4000, A.shape[1]), a=5**0.5)  # PEFT's
        assert bound * 0.8 < A.abs().max() <= bound and fresh.abs().max() == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize("n", [2, 12])
def test_flexlora_is_the_truncated_svd_of_the_dense_mean(n):
    """Of two clients N r is smaller than d, of twelve it is larger."""
    updates, shares = client_updates(KIND, n), [1 / n] * n
    result = fedrot.aggregate(updates, method="flexlora")
    for name, M in mean_update([KIND] * n, updates, shares).items():
        U, S, Vt = torch.linalg.svd(M)
        r = 4
        torch.testing.assert_close(dense(KIND, result.state_dict)[name], U[:, :r] * S[:r] @ Vt[:r], **close)
        A, B, s = modules(KIND, result.state_dict)[name]
        torch.testing.assert_close(A @ A.T, torch.diag(S[:r]) / s, **close)
        torch.testing.assert_close(B.T @ B, torch.diag(S[:r]) / s, **close)


def test_flexlora_of_unequal_ranks_takes_the_largest(unequal):
    result = fedrot.aggregate(unequal, WEIGHTS.tolist(), method="flexlora", configs=[lora_config(k) for k in UNEQUAL])
    expected = mean_update(UNEQUAL, unequal)
    # The result's own configuration says how to scale it.
    assert result.config["r"] == 6 and result.config["use_rslora"]
    for name, M in expected.items():
        key = f"{name}.lora_A.weight"
        r = len(result.state_dict[key])
        U, S, Vt = torch.linalg.svd(M)
        got = result.state_dict[key.replace("lora_A", "lora_B")] @ result.state_dict[key]
        torch.testing.assert_close(3 / 6**0.5 * got, U[:, :r] * S[:r] @ Vt[:r], **close)


def test_a_result_of_mixed_widest_ranks_spells_them_out():
    kinds = [replace(KIND, config=KIND.config | {"rank_pattern": p}) for p in ({"query": 6}, {"value": 7})]
    updates = [client_updates(kind, 1, seed)[0] for seed, kind in enumerate(kinds)]
    result = fedrot.aggregate(updates, method="flexlora", configs=[lora_config(k) for k in kinds])
    expected = mean_update(kinds, updates, [0.5, 0.5])
    merged = replace(KIND, config={k: v for k, v in result.config.items() if k in ("rank_pattern", "alpha_pattern", "r")})
    for name, update in dense(replace(merged, config=merged.config | KIND.config), result.state_dict).items():
        U, S, Vt = torch.linalg.svd(expected[name])
        r = len(result.state_dict[f"{name}.lora_A.weight"])
        torch.testing.assert_close(update, U[:, :r] * S[:r] @ Vt[:r], **close)


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("align_on", ["A", "B", "alternate", "joint"])
@pytest.mark.parametrize("method", ["fedrot", "random-rotation", "scalar"])
def test_what_a_client_brings_to_the_mean_is_its_own_update(method, align_on, reflections):
    reference, updates = turned_clients(KIND, 3)
    assert len(updates) == 3
    for strength in (0.5, 1.0):
        options = {"align_on": align_on, "reflections": reflections, "strength": strength, "round": 1}
        for update in updates:
            single = fedrot.aggregate([update], None, reference, method=method, **options)
            for (name, got), given in zip(dense(KIND, single.state_dict).items(), dense(KIND, update).values(), strict=True):
                torch.testing.assert_close(got, given, rtol=1e-6, atol=1e-6 * float(given.abs().max()), msg=name)
            keys = [key for pair in factor_keys(update) for key in pair]
            assert not any(torch.allclose(single.state_dict[key], update[key]) for key in keys)


def test_random_rotations_are_of_every_angle_and_of_the_seed():
    updates = client_updates(KIND, 3)
    angles = [a.angles for a in fedrot.aggregate(updates, method="random-rotation", strength=1).report.adapters]
    assert len({round(x, 6) for of_adapter in angles for x in of_adapter}) == 3 * len(angles)
    assert 60 < sum(map(sum, angles)) / (3 * len(angles)) < 120
    again = fedrot.aggregate(updates, method="random-rotation", strength=1).report.adapters
    other = fedrot.aggregate(updates, method="random-rotation", strength=1, seed=1).report.adapters
    assert [a.angles for a in again] == angles != [a.angles for a in other]


def test_the_scalar_is_the_projection_onto_the_reference():
    reference, updates = turned_clients(KIND, 2)
    result = fedrot.aggregate(updates, None, reference, method="scalar", align_on="A")
    for key_A, key_B in factor_keys(reference):
        Q_ref, A, B = reference[key_A], 0, 0
        for update in updates:
            c = (update[key_A] * Q_ref).sum() / update[key_A].square().sum()
            A, B = A + c * update[key_A] / 2, B + update[key_B] / c / 2
        torch.testing.assert_close(result.state_dict[key_A], A, **close)
        torch.testing.assert_close(result.state_dict[key_B], B, **close)
    zero = {key: torch.zeros_like(x) for key, x in reference.items()}
    undetermined = fedrot.aggregate(updates, None, zero, method="scalar").state_dict
    assert_same_bits(undetermined, fedrot.aggregate(updates, method="fedit").state_dict)


def test_lora_fair_comes_closer_to_the_mean_update_by_its_ridge_regression(updates):
    result = fedrot.aggregate(updates, WEIGHTS.tolist(), method="lora-fair")
    plain = fedrot.aggregate(updates, WEIGHTS.tolist(), method="fedit")
    expected = mean_update([KIND] * 3, updates)
    for name, (A, B, s) in modules(KIND, plain.state_dict).items():
        E = expected[name] / s - B @ A
        mu = 0.01 * (A @ A.T).diagonal().mean()
        # The normal equations of the ridge regression as one least-squares problem.
        left = torch.cat([A.T, mu.sqrt() * torch.eye(len(A), dtype=A.dtype)])
        right = torch.cat([E.T, torch.zeros(len(A), len(E), dtype=A.dtype)])
        delta = torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(result.state_dict[f"{name}.lora_B.weight"], (B + delta).detach(), **close)
    assert result.report.error < plain.report.error


def test_fedsa_shares_A_and_leaves_every_client_its_B(updates):
    result = fedrot.aggregate(updates, WEIGHTS.tolist(), method="fedsa-lora")
    plain = fedrot.aggregate(updates, WEIGHTS.tolist(), method="fedit").state_dict
    keys_B = {b for _, b in factor_keys(updates[0])}
    assert set(result.personal) == keys_B and not keys_B & result.state_dict.keys()
    assert result.state_dict.keys() | keys_B == updates[0].keys()
    assert_same_bits(result.state_dict, {key: x for key, x in plain.items() if key not in keys_B})


@pytest.mark.parametrize("method", METHODS)
def test_identical_clients_get_their_update_back(method):
    reference, (update, *_) = turned_clients(KIND, 1)
    if len(make_method(AggregationOptions(method=method)).trains(1)) == 1:
        reference = update  # whose frozen factor clients still have
    options = {"method": method, "round": 1, "configs": lora_config(KIND)}
    result = fedrot.aggregate([update] * 3, WEIGHTS.tolist(), reference, **options)
    whole = {**update, **result.state_dict} if result.personal else result.state_dict
    base = base_change(result) if result.base_update else {}
    for (name, got), given in zip(dense(KIND, whole).items(), dense(KIND, update).values(), strict=True):
        scale = float(given.abs().max())
        if method == "random-rotation":  # which turns even identical clients apart
            assert not torch.allclose(got, given, rtol=0, atol=0.1 * scale)
            continue
        torch.testing.assert_close(got + base.get(name, 0), given, rtol=1e-6, atol=1e-6 * scale, msg=name)
    heads = [key for key in update if "lora" not in key]
    assert heads and all(torch.allclose(result.state_dict[key], update[key]) for key in heads)


@pytest.mark.parametrize("method", STREAMING)
def test_added_one_by_one_they_are_what_they_are_at_once(method):
    reference, updates = turned_clients(KIND, 3)
    if frozen := set("AB") - set(make_method(AggregationOptions(method=method)).trains(1)):
        updates = with_frozen(updates, *frozen)
        reference = updates[0]
    aggregator = FedRotAggregator(reference, method=method, round=1)
    for update, weight in zip(updates, WEIGHTS.tolist(), strict=True):
        aggregator.add(update, weight)
    streamed = aggregator.finish()
    at_once = fedrot.aggregate(updates, WEIGHTS.tolist(), reference, method=method, round=1)
    assert streamed.state_dict.keys() == at_once.state_dict.keys() and streamed.personal == at_once.personal
    torch.testing.assert_close(streamed.state_dict, at_once.state_dict, rtol=1e-6, atol=1e-7)


def test_a_result_of_the_widest_client_has_its_scaling_too():
    """Both clients are widest at the query; the second alone everywhere, with another scaling."""
    kinds = [
        replace(KIND, config=KIND.config | {"r": 4, "lora_alpha": 4, "rank_pattern": {"query": 8}}),
        replace(KIND, config=KIND.config | {"r": 8, "lora_alpha": 32}),
    ]
    updates = [client_updates(kind, 1, seed)[0] for seed, kind in enumerate(kinds)]
    configs = [lora_config(kind) for kind in kinds]
    expected = mean_update(kinds, updates, [0.5, 0.5])
    result = fedrot.aggregate(updates, method="fedex-lora", configs=configs)
    changed = base_change(result)
    for name, update in dense(kinds[1], result.state_dict).items():
        torch.testing.assert_close(changed[name] + update, expected[name], **close)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["flexlora", "flora", "fedex-lora", "lora-fair"])
def test_half_precision_is_rounded_once(method, dtype):
    kind = KINDS[dtype]
    updates = client_updates(kind, 3)
    options = {"method": method, "configs": lora_config(kind)}
    result = fedrot.aggregate(updates, **options)
    exact = fedrot.aggregate([{key: x.double() for key, x in u.items()} for u in updates], **options)
    one = torch.finfo(kind.dtype).eps
    if method == "flexlora":  # whose factors are unique up to signs
        for key_A, key_B in factor_keys(updates[0]):
            got, expected = (r.state_dict[key_B].double() @ r.state_dict[key_A].double() for r in (result, exact))
            torch.testing.assert_close(got, expected, rtol=0, atol=8 * one * float(expected.abs().max()))
        return
    if method == "fedex-lora":  # what rounding the means loses is in the residual
        assert result.report.relative_error < 1e-6
    assert result.state_dict.keys() == exact.state_dict.keys()
    for key, x in exact.state_dict.items():
        got = result.state_dict[key]
        assert got.dtype == kind.dtype
        torch.testing.assert_close(got.double(), x, rtol=one, atol=one * float(x.abs().max()) / 8)
