"""Aggregation of adapters that PEFT made, against the definitions in float64."""

import weakref

import pytest
import torch

import fedrot

from ..definitions import (
    ROUNDING,
    WEIGHTS,
    assert_close,
    assert_same_bits,
    every_kind,
    expected_mean,
    factors,
    working,
)
from ..peft_models import KINDS, as_saved, client_updates, factor_keys, in_model, turned_clients

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
]


@pytest.mark.parametrize(("reflections", "reflect"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("on", ["A", "B", "joint"])
@every_kind
def test_aggregate_is_what_the_definitions_say(kind, on, strength, reflections, reflect):
    reference, clients = turned_clients(kind, 3, reflect=reflect)
    options = {"reflections": reflections, "strength": strength}
    mean = fedrot.aggregate(clients, WEIGHTS, reference, align_on=on, **options).state_dict
    truth = expected_mean(clients, WEIGHTS, reference, on, dtype=torch.float64, **options)
    plain = expected_mean(clients, WEIGHTS, reference, on, dtype=working(kind.dtype), **options)
    assert mean.keys() == truth.keys() == reference.keys()
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


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("on", ["A", "B", "joint"])
@every_kind
def test_one_update_in_many_bases_comes_back_as_itself(kind, on, reflections):
    reference, clients = turned_clients(kind, 4, noise=0, reflect=reflections)
    result = fedrot.aggregate(clients, reference=reference, align_on=on, reflections=reflections, strength=1)
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


def test_without_a_reference_the_one_of_largest_weight_stands_in_for_it():
    _, clients = turned_clients(KINDS["linear"], 3)
    for weights, first in ((WEIGHTS, 2), (None, 0), ([1, 3, 3], 1)):
        for method in ("fedrot-adaptive", "scalar", "fedrot-consensus"):
            expected = fedrot.aggregate(clients, weights, clients[first], method=method)
            result = fedrot.aggregate(clients, weights, method=method)
            assert_same_bits(result.state_dict, expected.state_dict)
            rotated = f"client {first}, because there is no reference"
            assert method == "scalar" or rotated in str(result.report)
            assert rotated not in str(expected.report)


def test_a_whole_round_without_a_reference_takes_the_consensus():
    common, clients = turned_clients(KINDS["linear"], 3, noise=0.3)
    for options in ({}, {"strength": 0.5}, {"align_on": "A", "reflections": True}):
        expected = fedrot.aggregate(clients, WEIGHTS, method="fedrot-consensus", **options)
        result = fedrot.aggregate(clients, WEIGHTS, **options)
        assert_same_bits(result.state_dict, expected.state_dict)
        assert result.report.method == "fedrot" and "rotated towards the consensus" in str(result.report)
    # Half the way towards one client, as the default would be, loses several times as much.
    towards_one = fedrot.aggregate(clients, WEIGHTS, clients[2])
    assert 3 * fedrot.aggregate(clients, WEIGHTS).report.error < towards_one.report.error
    plain = fedrot.aggregate(clients, WEIGHTS, strength=0)
    assert_same_bits(plain.state_dict, fedrot.aggregate(clients, WEIGHTS, method="fedit").state_dict)
    assert str(plain.report).splitlines()[-1] == "nothing was rotated"
    assert "rotated towards the reference" in str(fedrot.aggregate(clients, WEIGHTS, common).report).splitlines()


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
