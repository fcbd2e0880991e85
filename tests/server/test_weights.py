"""How much a client counts: by its weight, not at all at weight zero, and not if it is dropped."""

import math

import pytest

import fedrot

from ..definitions import WEIGHTS, assert_close, assert_same_bits, every_kind
from ..peft_models import KINDS, turned_clients

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
]


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
