"""Heads, biases and DoRA's magnitudes in distances; bad input; and what cannot compare clients."""

import pytest
import torch

import fedrot
from fedrot import FedRotAggregator

from ..dense import KIND
from ..peft_models import KINDS, client_updates, factor_keys
from ..refusals import refused
from .rounds import HEAD, attacked, honest, pairs, vectors


def squares(clients, **options):
    choice = fedrot.aggregate(clients, robust="geometric-median", report_error=False, **options).report.choice
    return torch.tensor(choice.distances, dtype=torch.float64).square(), choice


def with_heads(clients, scale):
    return [{key: x if "lora_" in key else x * scale for key, x in client.items()} for client in clients]


def test_small_heads_count_as_they_are():
    clients = with_heads(honest(6), 1e-3)
    found, choice = squares(pairs(clients))
    X = vectors(clients)
    torch.testing.assert_close(found, torch.stack([(X - x).square().sum(1) for x in X]), rtol=1e-9, atol=1e-9)
    assert choice.other_weight == 1


def test_large_heads_count_as_much_as_the_updates():
    clients = with_heads(honest(7), 1e3)
    found, choice = squares(pairs(clients))
    lora = vectors(clients, heads=False)
    lora = torch.stack([(lora - x).square().sum(1) for x in lora])
    X = vectors(clients)
    heads = torch.stack([(X - x).square().sum(1) for x in X]) - lora
    medians = [torch.stack([row[row > 0].median() for row in D]).median() for D in (lora, heads)]
    assert choice.other_weight == pytest.approx(float(medians[0] / medians[1])) and choice.other_weight < 1e-3
    torch.testing.assert_close(found, lora + choice.other_weight * heads, rtol=1e-6, atol=1e-9)
    assert "heads and other tensors count" in "\n".join(choice.lines())


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_an_attack_on_the_head_alone_is_seen(scale):
    clients = with_heads(honest(9), scale)
    for client in clients[7:]:
        client[HEAD] = client[HEAD] + 1e3
    choice = fedrot.aggregate(pairs(clients), robust="multi-krum", byzantine=2).report.choice
    assert choice.refused.keys() == {"client 7", "client 8"}


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_an_attack_on_the_updates_is_seen_beside_large_heads(scale):
    clients = with_heads(attacked(9, 2, -4), scale)
    choice = fedrot.aggregate(pairs(clients), robust="multi-krum", byzantine=2).report.choice
    assert choice.refused.keys() == {"client 7", "client 8"}


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "float16"])
def test_everything_that_is_sent_counts(kind):
    clients = honest(5, kind=KINDS[kind])
    found, _ = squares(pairs(clients, KINDS[kind]))
    for key in clients[0]:
        changed = [dict(client) for client in clients]
        changed[1][key] = changed[1][key] + 1
        moved, _ = squares(pairs(changed, KINDS[kind]))
        assert moved[1, 0] != found[1, 0], key


def test_updates_that_agree_leave_the_choice_to_the_heads():
    clients = [dict(honest(1)[0]) for _ in range(5)]
    for i, client in enumerate(clients):
        client[HEAD] = client[HEAD] + (10 if i == 4 else 0.1 * i)
    choice = fedrot.aggregate(pairs(clients), robust="multi-krum", byzantine=1).report.choice
    assert choice.refused.keys() == {"client 4"} and choice.other_weight == 1


@pytest.mark.parametrize(("rule", "n", "f", "needed"), [("krum", 2, None, 3), ("multi-krum", 6, 2, 7), ("krum", 10, 4, 11)])
def test_too_few_clients_for_krum(rule, n, f, needed):
    with refused(f"robust='{rule}'", f"2f + 3 = {needed}", f"has {n}", f"f = {f or 0}"):
        fedrot.aggregate(pairs(honest(n)), robust=rule, byzantine=f)


def test_dropped_clients_are_too_few_for_krum_too():
    clients = honest(5)
    clients[1][HEAD] = clients[1][HEAD] * torch.nan
    with refused("client 1", HEAD, "NaN or Inf"):
        fedrot.aggregate(pairs(clients), robust="krum")
    report = fedrot.aggregate(pairs(clients), robust="krum", on_invalid="drop").report
    assert list(report.dropped) == ["client 1"] and report.choice.byzantine == 0 and len(report.choice.clients) == 4
    with refused("2f + 3 = 5", "has 4"):
        fedrot.aggregate(pairs(clients), robust="krum", on_invalid="drop", byzantine=1)


@pytest.mark.parametrize("rule", ["multi-krum", "geometric-median"])
def test_distances_that_overflow_name_client_module_and_shapes(rule):
    clients = honest(5)
    a, _ = factor_keys(clients[0])[1]
    clients[3][a] = clients[3][a] * 1e200
    with refused("client 3", a.split(".lora_")[0], "A (r, 16), B (16, r)", "overflows float64"):
        fedrot.aggregate(pairs(clients), robust=rule)
    clients = honest(5)
    clients[2][HEAD] = clients[2][HEAD] * 1e200
    with refused("client 2", "other tensors", "overflows float64"):
        fedrot.aggregate(pairs(clients), robust=rule)


def test_a_median_of_zero_would_leave_nobody():
    reference = honest(1)[0]
    clients = [dict(reference) for _ in range(4)] + honest(1, seed=3)
    with refused("clip='median' is 0", "4 of 5 clients changed nothing", "client 4"):
        fedrot.aggregate(pairs(clients), reference=pairs([reference])[0], clip="median")
    assert fedrot.aggregate(pairs(clients[:4]), reference=pairs([reference])[0], clip="median").report.choice.clipped == {}


def test_a_reference_without_the_head_cannot_bound_its_change():
    clients = honest(4)
    bare = {key: x for key, x in clients[0].items() if "lora_" in key}
    with refused("the reference has no", "classifier", "clip="):
        fedrot.aggregate(clients, reference=bare, clip=1.0)
    assert fedrot.aggregate(clients, reference=bare, robust="krum").state_dict


def test_options_that_do_not_go_together():
    with refused("byzantine=2", "robust='geometric-median'", "krum and multi-krum", error=ValueError):
        fedrot.AggregationOptions(robust="geometric-median", byzantine=2)
    with refused("robust and clip", "fedsa-lora averages A alone", error=ValueError):
        fedrot.aggregate(honest(3), method="fedsa-lora", robust="krum")


@pytest.mark.parametrize("options", [{"robust": "krum"}, {"clip": 1.0}])
def test_streams_and_clients_alone_cannot_compare(options):
    (clients, given) = honest(3), f"{next(iter(options))}={next(iter(options.values()))!r}"
    aggregator = FedRotAggregator(clients[0], **options)
    for call in (lambda: aggregator.add(clients[0]), aggregator.partial):
        with refused(given, "all updates of a round", error=ValueError):
            call()
    with refused("robust and clip compare the updates of all clients", "secure", error=TypeError):
        fedrot.align(clients[0], clients[1], **options)


def test_the_report_says_who_and_why():
    report = fedrot.aggregate(pairs(attacked(7, 2)), robust="krum", clip=1.0).report
    text = str(report)
    assert "krum against 2 attackers: 1 of 7 clients count" in text and "refused client 6: its score is" in text
    assert "changes clipped to 1: 1 of 7 clients" in text
    plain = report.as_dict()["choice"]
    assert len(plain["distances"]) == 7 and plain["refused"].keys() == report.choice.refused.keys()
    assert fedrot.aggregate(client_updates(KIND, 2)).report.choice is None
