"""Aggregation of adapters that PEFT made, against the definitions in float64."""

import itertools
import math
import weakref

import pytest
import torch

import fedrot
from fedrot_kernels import reference as oracle
from fedrot_kernels.measures import rotation_angle

from ..peft_models import KINDS, as_saved, client_updates, factor_keys, in_model, turned_clients

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
]
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

WEIGHTS = [1.0, 2.0, 4.5]
SHARES = [w / 7.5 for w in WEIGHTS]
# Relative to a tensor's largest entry: what Newton-Schulz may lose beyond what an SVD in the same dtype loses.
ROUNDING = {torch.float32: 3e-6, torch.float64: 1e-12}


def working(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding(dtype):
    """Relative to a tensor's largest entry: one rounding of the output, and what computing it loses."""
    return torch.finfo(dtype).eps / 2 + ROUNDING[working(dtype)]


def factors(update, keys, dtype=torch.float64):
    A, B = (update[key].detach().to(dtype).flatten(1) for key in keys)
    return A, B


def expected_rotations(clients, reference, keys, on, group, strength, dtype=torch.float64):
    A_ref, B_ref = factors(reference, keys, dtype)
    rotations = []
    for A, B in (factors(client, keys, dtype) for client in clients):
        M_A, M_B = oracle.cross_covariance(A, A_ref), oracle.cross_covariance(B.T, B_ref.T)
        M = {"A": M_A, "B": M_B, "joint": M_A / A_ref.square().sum() + M_B / B_ref.square().sum()}[on]
        R = oracle.special_orthogonal(M) if group == "SO" else oracle.polar(M)
        rotations.append(oracle.soften(R, strength))
    return rotations


def expected_mean(clients, weights, reference, on, group, strength, dtype=torch.float64):
    """The definitions, one adapter at a time; float64 is the truth, a lower dtype shows what plain torch loses."""
    total = sum(weights)
    mean = {key: sum(w / total * c[key].to(dtype) for w, c in zip(weights, clients, strict=True)) for key in clients[0]}
    for keys in factor_keys(reference):
        R = expected_rotations(clients, reference, keys, on, group, strength, dtype)
        A, B = zip(*(factors(client, keys, dtype) for client in clients), strict=True)
        mean[keys[0]] = oracle.rotate_average(A, R, weights).reshape(mean[keys[0]].shape)
        mean[keys[1]] = oracle.rotate_average([b.T for b in B], R, weights).T.reshape(mean[keys[1]].shape)
    return mean


def assert_same_bits(first, second):
    assert list(first) == list(second)
    for key in first:
        assert torch.equal(first[key], second[key]), key


def assert_close(first, second):
    assert list(first) == list(second)
    for key, x in second.items():
        bound = 2 * rounding(x.dtype) * x.abs().max().double()
        assert (first[key].double() - x.double()).abs().max() <= bound, key


@pytest.mark.parametrize(("group", "reflect"), [("SO", False), ("SO", True), ("O", True)])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("on", ["A", "B", "joint"])
@every_kind
def test_aggregate_is_what_the_definitions_say(kind, on, strength, group, reflect):
    reference, clients = turned_clients(kind, 3, reflect=reflect)
    options = {"group": group, "strength": strength}
    mean = fedrot.aggregate(clients, WEIGHTS, reference, align_on=on, **options).state_dict
    truth = expected_mean(clients, WEIGHTS, reference, on, dtype=torch.float64, **options)
    plain = expected_mean(clients, WEIGHTS, reference, on, dtype=working(kind.dtype), **options)
    for key, x in truth.items():
        theirs = (plain[key].to(kind.dtype).double() - x).abs().max()
        bound = theirs + ROUNDING[working(kind.dtype)] * x.abs().max()
        assert (mean[key].double() - x).abs().max() <= bound, key


@pytest.mark.parametrize(("round", "on"), [(0, "B"), (1, "A"), (2, "B"), (7, "A")])
def test_alternate_aligns_A_in_odd_rounds_and_B_in_even_ones(round, on):
    reference, clients = turned_clients(KINDS["convolution"], 3)
    alternating = fedrot.aggregate(clients, reference=reference, align_on="alternate", round=round).state_dict
    assert_same_bits(alternating, fedrot.aggregate(clients, reference=reference, align_on=on).state_dict)
    other = fedrot.aggregate(clients, reference=reference, align_on="AB".replace(on, "")).state_dict
    assert not all(torch.equal(alternating[key], other[key]) for key in other)


@every_kind
def test_strength_zero_is_fedit_and_fedit_is_the_weighted_mean(kind):
    clients = client_updates(kind, 3)
    fedit = fedrot.aggregate(clients, WEIGHTS, method="fedit").state_dict
    assert_same_bits(fedit, fedrot.aggregate(clients, WEIGHTS, clients[1], strength=0).state_dict)
    stream = fedrot.FedRotAggregator(strength=0)
    for client, weight in zip(clients, WEIGHTS, strict=True):
        stream.add(client, weight)
    assert_same_bits(fedit, stream.finish().state_dict)
    for key, x in fedit.items():
        mean = sum(w * c[key].double() for w, c in zip(WEIGHTS, clients, strict=True)) / sum(WEIGHTS)
        eps = torch.finfo(kind.dtype).eps / 2 * mean.abs() + 4 * torch.finfo(working(kind.dtype)).eps * mean.abs().max()
        assert ((x.double() - mean).abs() <= eps).all(), key


@pytest.mark.parametrize("group", ["SO", "O"])
@pytest.mark.parametrize("on", ["A", "B", "joint"])
@every_kind
def test_align_keeps_every_update_and_its_mean_is_aggregate(kind, on, group):
    reference, clients = turned_clients(kind, 3, reflect=True)
    options = {"align_on": on, "group": group, "strength": 0.8}
    aligned = [fedrot.align(client, reference, **options) for client in clients]
    for client, rotated in zip(clients, aligned, strict=True):
        assert [(k, x.shape, x.dtype) for k, x in rotated.items()] == [(k, x.shape, x.dtype) for k, x in client.items()]
        for keys in factor_keys(client):
            (A, B), (A_rotated, B_rotated) = factors(client, keys), factors(rotated, keys)
            assert (A - A_rotated).norm() > 0.1 * A.norm() or len(A) == 1
            # Each factor is rounded once to its dtype, and R differs from an orthogonal matrix by a rounding.
            eps = torch.finfo(kind.dtype).eps + 8 * torch.finfo(working(kind.dtype)).eps
            assert (B_rotated @ A_rotated - B @ A).norm() <= eps * A.norm() * B.norm()
        for key in client.keys() - set(itertools.chain(*factor_keys(client))):
            assert torch.equal(rotated[key], client[key])
    mean = fedrot.aggregate(aligned, WEIGHTS, method="fedit").state_dict
    assert_close(mean, fedrot.aggregate(clients, WEIGHTS, reference, **options).state_dict)


@pytest.mark.parametrize(("group", "reflect"), [("SO", False), ("O", True)])
@pytest.mark.parametrize("on", ["A", "B", "joint"])
@every_kind
def test_one_update_in_many_bases_comes_back_as_itself(kind, on, group, reflect):
    reference, clients = turned_clients(kind, 4, noise=0, reflect=reflect)
    result = fedrot.aggregate(clients, reference=reference, align_on=on, group=group, strength=1)
    fedit = fedrot.aggregate(clients, method="fedit")
    for keys, report in zip(factor_keys(reference), result.report.adapters, strict=True):
        (A, B), (A_mean, B_mean), (A_fedit, B_fedit) = (
            factors(update, keys) for update in (reference, result.state_dict, fedit.state_dict)
        )
        # Both factors of the clients were rounded when they were turned, and both of the mean are.
        eps = 2 * torch.finfo(kind.dtype).eps + 8 * torch.finfo(working(kind.dtype)).eps
        assert (B_mean @ A_mean - B @ A).norm() <= eps * A.norm() * B.norm()
        assert report.error <= eps * A.norm() * B.norm()
        if len(A) > 1:  # of rank 1 there are two bases only
            assert (B_fedit @ A_fedit - B @ A).norm() > 0.1 * (B @ A).norm()


@pytest.mark.parametrize("method", ["fedrot", "fedit"])
@every_kind
def test_updates_one_by_one_give_what_they_give_at_once(kind, method):
    reference, clients = turned_clients(kind, 3)
    at_once, streamed, again = (fedrot.FedRotAggregator(reference, method=method, round=4) for _ in range(3))
    for round in (4, 5):
        whole = at_once.aggregate(clients, WEIGHTS)
        results = []
        for aggregator in (streamed, again):
            for client, weight in zip(clients, WEIGHTS, strict=True):
                aggregator.add(client, weight)
            results.append(aggregator.finish())
        assert_same_bits(results[0].state_dict, results[1].state_dict)
        assert_close(results[0].state_dict, whole.state_dict)
        reports = [result.report for result in (whole, *results)]
        assert [(r.round, r.clients, r.weights) for r in reports] == [
            (round, whole.report.clients, whole.report.weights)
        ] * 3
        assert reports[0].angle == pytest.approx(reports[1].angle, abs=1e-2)
        assert reports[0].error > 0 and reports[1].error == pytest.approx(reports[0].error, abs=6 * reports[1].deviation)
        for aggregator, result in zip((at_once, streamed), (whole, results[0]), strict=True):
            assert aggregator.round == round + 1
            assert_same_bits(aggregator.reference, result.state_dict)


def test_the_second_round_aligns_to_the_result_of_the_first():
    reference, clients = turned_clients(KINDS["modules to save"], 3)
    aggregator = fedrot.FedRotAggregator(reference)
    first = aggregator.aggregate(clients)
    assert_same_bits(first.state_dict, fedrot.aggregate(clients, reference=reference, round=0).state_dict)
    second = fedrot.aggregate(clients[1:], reference=first.state_dict, round=1).state_dict
    assert_same_bits(aggregator.aggregate(clients[1:]).state_dict, second)


@every_kind
def test_results_have_the_keys_shapes_and_dtypes_of_the_first_update(kind):
    reference, clients = turned_clients(kind, 3)
    saved = fedrot.aggregate(clients, WEIGHTS, reference).state_dict
    assert [(k, x.shape, x.dtype) for k, x in saved.items()] == [(k, x.shape, x.dtype) for k, x in clients[0].items()]
    named = [in_model(kind, client) for client in clients]
    other_name = {key.replace(".default", ".server"): x for key, x in in_model(kind, reference).items()}
    for reference_form in (reference, in_model(kind, reference), other_name):
        mean = fedrot.aggregate(named, WEIGHTS, reference_form).state_dict
        assert [(k, x.shape, x.dtype) for k, x in mean.items()] == [(k, x.shape, x.dtype) for k, x in named[0].items()]
        assert not any(x.requires_grad for x in mean.values())
        assert_close(as_saved(kind, mean), saved)
        aligned = fedrot.align(named[0], reference_form)
        assert list(aligned) == list(named[0]) and not any(x.requires_grad for x in aligned.values())
    reordered = dict(reversed(named[1].items()))
    assert_close(fedrot.aggregate([clients[0], reordered, clients[2]], WEIGHTS, reference).state_dict, saved)


@every_kind
def test_the_report_measures_every_adapter(kind):
    reference, clients = turned_clients(kind, 3, noise=1.0)
    options = {"on": "A", "group": "O", "strength": 1.0}
    report = fedrot.aggregate(clients, WEIGHTS, reference, align_on="A", group="O", strength=1.0).report
    assert report.clients == ("client 0", "client 1", "client 2") and report.dropped == {} and report.method == "fedrot"
    assert report.weights == pytest.approx(SHARES, rel=1e-15)
    squares = torch.zeros(2, dtype=torch.float64)
    for keys, adapter in zip(factor_keys(reference), report.adapters, strict=True):
        assert keys[0].startswith(adapter.module + ".lora_") and adapter.rank == len(reference[keys[0]])
        R = expected_rotations(clients, reference, keys, **options)
        A, B = zip(*(factors(client, keys) for client in clients), strict=True)
        turned = [r.T @ a for r, a in zip(R, A, strict=True)], [b @ r for r, b in zip(R, B, strict=True)]
        error = oracle.aggregation_error(*turned, WEIGHTS)
        norm = sum(w * b @ a for w, a, b in zip(SHARES, A, B, strict=True)).norm()
        assert adapter.error == pytest.approx(error.item(), abs=1e-5 * norm.item())
        assert adapter.update_norm == pytest.approx(norm.item(), rel=1e-5)
        assert adapter.relative_error == adapter.error / adapter.update_norm
        assert adapter.angles == pytest.approx(rotation_angle(torch.stack(R)).tolist(), abs=0.05)
        squares += torch.stack([error, norm]).square()
    whole = [squares[0].sqrt().item(), (squares[0] / squares[1]).sqrt().item()]
    assert [report.error, report.relative_error] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("method", ["fedrot", "fedit"])
@every_kind
def test_leaving_out_the_error_leaves_out_nothing_else(kind, method):
    reference, clients = turned_clients(kind, 3)
    whole = fedrot.aggregate(clients, WEIGHTS, reference, method=method)
    quick = fedrot.aggregate(clients, WEIGHTS, reference, method=method, report_error=False)
    assert_same_bits(quick.state_dict, whole.state_dict)
    assert [a.angles for a in quick.report.adapters] == [a.angles for a in whole.report.adapters]
    assert {(a.error, a.update_norm, a.relative_error) for a in quick.report.adapters} == {(None, None, None)}
    assert quick.report.error is None and quick.report.relative_error is None and "–" in str(quick.report)
    aggregator = fedrot.FedRotAggregator(reference, method=method, report_error=False)
    assert aggregator.aggregate(clients, WEIGHTS).report == quick.report


@pytest.mark.parametrize("position", [0, 1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["query.lora_A.weight", "value.lora_B.weight", "classifier.bias"])
@pytest.mark.parametrize("start", ["reference", None])
def test_dropping_a_client_is_aggregating_without_it(start, key, bad, position):
    reference, clients = turned_clients(KINDS["modules to save"], 3)
    start = reference if start else None
    without = fedrot.aggregate(clients, WEIGHTS, start)
    (key,) = (name for name in clients[0] if name.endswith(key))
    broken = {name: x.clone() for name, x in clients[1].items()}
    broken[key].view(-1)[-1] = bad
    clients = [*clients[:position], broken, *clients[position:]]
    weights = [*WEIGHTS[:position], 100.0, *WEIGHTS[position:]]
    result = fedrot.aggregate(clients, weights, start, on_invalid="drop")
    assert_same_bits(result.state_dict, without.state_dict)
    name = f"client {position}"
    assert list(result.report.dropped) == [name] and key in result.report.dropped[name]
    assert name not in result.report.clients and len(result.report.clients) == 3
    assert [a.error for a in result.report.adapters] == [a.error for a in without.report.adapters]
    assert result.report.weights == without.report.weights
    if start:
        stream = fedrot.FedRotAggregator(start, on_invalid="drop")
        for client, weight in zip(clients, weights, strict=True):
            stream.add(client, weight)
        streamed = stream.finish()
        assert_close(streamed.state_dict, without.state_dict)
        assert (streamed.report.clients, streamed.report.dropped) == (result.report.clients, result.report.dropped)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
@every_kind
def test_only_the_ratio_of_weights_matters(kind, scale):
    reference, clients = turned_clients(kind, 3)
    expected = fedrot.aggregate(clients, WEIGHTS, reference)
    result = fedrot.aggregate(clients, [w * scale for w in WEIGHTS], reference)
    assert_close(result.state_dict, expected.state_dict)
    assert result.report.weights == pytest.approx(expected.report.weights, rel=1e-12)
    assert result.report.error == pytest.approx(expected.report.error, rel=1e-5)


def test_weights_whose_sum_overflows_still_have_shares():
    _, clients = turned_clients(KINDS["linear"], 3)
    result = fedrot.aggregate(clients, [1e308] * 3)
    assert_close(result.state_dict, fedrot.aggregate(clients).state_dict)
    assert result.report.weights == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("weights", [[1e-25, 1e25, 1.0], [1e-300, 1e300, 1e-300], [1e25, 1.0, 0.0]])
@pytest.mark.parametrize("method", ["fedit", "fedrot"])
def test_a_client_that_outweighs_the_others_is_the_result(method, weights):
    reference, clients = turned_clients(KINDS["modules to save"], 3)
    heaviest = clients[weights.index(max(weights))]
    expected = fedrot.aggregate([heaviest], reference=reference, method=method).state_dict
    assert_close(fedrot.aggregate(clients, weights, reference, method=method).state_dict, expected)


@every_kind
def test_a_client_of_weight_zero_has_no_effect(kind):
    reference, (other, *clients) = turned_clients(kind, 4)
    for start in (reference, None):
        expected = fedrot.aggregate(clients, WEIGHTS, start).state_dict
        for position in (0, 3):
            everyone = [*clients[:position], other, *clients[position:]]
            weights = [*WEIGHTS[:position], 0.0, *WEIGHTS[position:]]
            assert_close(fedrot.aggregate(everyone, weights, start).state_dict, expected)


@pytest.mark.parametrize("start", ["reference", None])
@pytest.mark.parametrize("key", ["query.lora_A.weight", "value.lora_B.weight", "classifier.bias"])
@pytest.mark.parametrize("method", ["fedrot", "fedit"])
def test_nan_is_found_in_a_client_of_weight_zero(method, key, start):
    reference, clients = turned_clients(KINDS["modules to save"], 3)
    start = reference if start else None
    (key,) = (name for name in clients[0] if name.endswith(key))
    broken = {name: x.clone() for name, x in clients[1].items()}
    broken[key].view(-1)[0] = math.nan
    clients = [clients[0], broken, clients[2]]
    with pytest.raises(fedrot.UpdateError, match=r"client 1.*NaN"):
        fedrot.aggregate(clients, [1, 0, 1], start, method=method)
    dropped = fedrot.aggregate(clients, [1, 0, 1], start, method=method, on_invalid="drop")
    expected = fedrot.aggregate([clients[0], clients[2]], [1, 1], start, method=method)
    assert_same_bits(dropped.state_dict, expected.state_dict)
    assert list(dropped.report.dropped) == ["client 1"]


def test_without_a_reference_clients_are_aligned_to_the_one_of_largest_weight():
    _, clients = turned_clients(KINDS["linear"], 3)
    for weights, first in ((WEIGHTS, 2), (None, 0), ([1, 3, 3], 1)):
        expected = fedrot.aggregate(clients, weights, clients[first], strength=1)
        assert_same_bits(fedrot.aggregate(clients, weights, strength=1).state_dict, expected.state_dict)
        assert expected.report.adapters[0].angles[first] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "float16", "bfloat16", "float64"])
def test_the_reference_may_have_another_dtype(kind, dtype):
    reference, clients = turned_clients(KINDS[kind], 3)
    reference = {key: (x * 64).round() / 64 for key, x in reference.items()}  # the same number in every dtype
    expected = fedrot.aggregate(clients, WEIGHTS, reference).state_dict
    converted = {key: x.to(dtype) for key, x in reference.items()}
    assert_close(fedrot.aggregate(clients, WEIGHTS, converted).state_dict, expected)
    aligned = fedrot.align(clients[0], converted)
    assert_close(aligned, fedrot.align(clients[0], reference))


@pytest.mark.parametrize("method", ["fedrot", "fedit"])
@every_kind
def test_inputs_stay_as_they_are_and_results_are_the_callers_own(kind, method):
    reference, clients = turned_clients(kind, 2)
    everything = [reference, *clients]
    before = [{key: x.clone() for key, x in update.items()} for update in everything]
    stream = fedrot.FedRotAggregator(reference, method=method)
    for client in clients:
        stream.add(client)
    results = [fedrot.aggregate(clients, reference=reference, method=method).state_dict for _ in range(2)]
    assert_same_bits(*results)
    results += [stream.finish().state_dict, fedrot.aggregate(clients[:1], method=method).state_dict]
    fedrot.align(clients[0], reference)
    for update, copy in zip(everything, before, strict=True):
        assert_same_bits(update, copy)
    storages = [x.untyped_storage().data_ptr() for result in results for x in result.values()]
    given = {x.untyped_storage().data_ptr() for update in everything for x in update.values()}
    assert len(set(storages)) == len(storages) and not given & set(storages)


def test_a_stream_keeps_nothing_of_an_update():
    kind = KINDS["linear"]
    aggregator = fedrot.FedRotAggregator(client_updates(kind, 1)[0])
    for update in client_updates(kind, 3, seed=1):
        copy = {key: x.clone() for key, x in update.items()}
        alive = [weakref.ref(x) for x in copy.values()]
        aggregator.add(copy)
        del copy
        assert not any(ref() is not None for ref in alive)
    aggregator.finish()
