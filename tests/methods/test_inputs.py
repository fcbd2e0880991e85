"""What methods are given: clients that differ or are broken, configurations, names. Each error says whose and what."""

import pytest
import torch

import fedrot
from fedrot import METHODS, FedRotAggregator
from fedrot.methods.registry import make_method
from fedrot.options import AggregationOptions

from ..definitions import assert_same_bits
from ..dense import KIND, UNEQUAL, lora_config, with_frozen
from ..peft_models import KINDS, client_updates, factor_keys
from ..refusals import refused
from ..streams import NEEDS_ALL


@pytest.mark.parametrize(("method", "round", "frozen"), [("ffa-lora", 0, "A"), ("rolora", 0, "A"), ("rolora", 1, "B")])
def test_a_frozen_factor_that_moved_is_refused(updates, method, round, frozen):
    updates = with_frozen(updates, frozen)
    key = factor_keys(updates[0])[0]["AB".index(frozen)]
    updates[1][key] = updates[1][key] + 1e-9
    with refused("client 1", key, "frozen in this round of " + method):
        fedrot.aggregate(updates, method=method, round=round)
    aggregator = FedRotAggregator(method=method, round=round)
    aggregator.add(updates[0])
    with refused("client 1", key, "frozen"):
        aggregator.add(updates[1])


@pytest.mark.parametrize("method", NEEDS_ALL)
def test_what_needs_all_updates_says_so(updates, method):
    with pytest.raises(ValueError, match=rf"{method} needs all updates of a round at once: aggregate"):
        FedRotAggregator(method=method).add(updates[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_client_with_nan_is_refused_or_dropped(updates, method):
    if frozen := set("AB") - set(make_method(AggregationOptions(method=method)).trains(0)):
        updates = with_frozen(updates, *frozen)
    key = factor_keys(updates[0])[0][1]
    updates[1] = {**updates[1], key: updates[1][key] * torch.nan}
    options = {"method": method, "configs": lora_config(KIND)}
    with refused("client 1", key, "NaN"):
        fedrot.aggregate(updates, **options)
    result = fedrot.aggregate(updates, on_invalid="drop", **options)
    assert list(result.report.dropped) == ["client 1"]
    without = fedrot.aggregate([updates[0], updates[2]], **options)
    if method == "random-rotation":  # whose rotations are those of the client's number
        assert result.report.adapters[0].angles[0] == without.report.adapters[0].angles[0]
        assert result.report.adapters[0].angles[1] != without.report.adapters[0].angles[1]
        return
    assert_same_bits(result.state_dict, without.state_dict)


@pytest.mark.parametrize("method", ["fedit", "random-rotation", "lora-fair"])
def test_unequal_ranks_are_refused_where_no_definition_covers_them(unequal, method):
    with refused("client 1", "shape", "ranks"):
        fedrot.aggregate(unequal, method=method, configs=[lora_config(k) for k in UNEQUAL])


def test_scalings_must_be_known_where_they_matter(updates, unequal):
    for method in ("flora", "fedex-lora"):
        with refused(method, "scaling s", "configs="):
            fedrot.aggregate(updates, method=method)
    with refused("client 0 has no LoRA configuration", "configs="):
        fedrot.aggregate(unequal, method="flexlora")
    with refused("2 configs for 3 updates"):
        fedrot.aggregate(updates, method="flora", configs=[lora_config(KIND)] * 2)


def test_what_flora_cannot_merge_is_refused():
    kind = KINDS["DoRA"]
    with refused("lora_magnitude_vector", "flora merges"):
        fedrot.aggregate(client_updates(kind, 2), method="flora", configs=lora_config(kind))


@pytest.mark.parametrize("method", ["flexlora", "flora", "fedex-lora"])
def test_the_widest_client_may_be_dropped(unequal, method):
    unequal[1] = {key: x * torch.nan for key, x in unequal[1].items()}
    configs = [lora_config(k) for k in UNEQUAL]
    result = fedrot.aggregate(unequal, method=method, configs=configs, on_invalid="drop")
    kept = [unequal[0], unequal[2]]
    without = fedrot.aggregate(kept, method=method, configs=[configs[0], configs[2]])
    assert_same_bits(result.state_dict, without.state_dict)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"default": {"peft_type": "LORA", "lora_alpha": 32}}, "peft_type None"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": "LORA", "r": 4, "target_parameters": "experts"}, "target_parameters"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": None}, "lora_alpha is None"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 0}, "lora_alpha is 0"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"peft_type": "LORA", "r": 4, "alpha_pattern": [1]}, "alpha_pattern is [1]"),
        ({"peft_type": "LORA", "r": 4, "alpha_pattern": {"(": 3}}, "'('"),
        ({"peft_type": "LORA", "r": 4, "alpha_pattern": {"(?!x)(.+)+!": 3}}, "could take forever"),
        ({"peft_type": "LORA", "r": None}, "r is None"),
        ({"peft_type": "LORA", "r": "4"}, "r is '4'"),
        ({"peft_type": "LORA"}, "rank 8 (PEFT's default"),
        ({"peft_type": "LORA", "r": 5}, "rank 5"),
    ],
)
def test_a_configuration_that_is_none_names_its_client(updates, config, why):
    good = lora_config(KIND)
    with refused("client 1", why):
        fedrot.aggregate(updates, method="flora", configs=[good, config, good])


def test_an_overflow_is_named():
    updates = [{key: x.float() * 1e25 for key, x in u.items()} for u in client_updates(KIND, 2)]
    with refused("overflows"):
        fedrot.aggregate(updates, method="flexlora")
    updates = [{key: x / 1e25 for key, x in u.items()} for u in updates]
    with refused("overflows"):
        fedrot.aggregate(updates, method="flora", configs={"peft_type": "LORA", "r": 4, "lora_alpha": 1e39})


def test_a_frozen_factor_comes_back_in_the_clients_dtype():
    kind = KINDS["float16"]
    start = client_updates(kind, 1)[0]
    reference = {key: x.float() for key, x in start.items()}
    result = fedrot.aggregate([start, start], None, reference, method="ffa-lora")
    assert {x.dtype for x in result.state_dict.values()} == {torch.float16}
    aggregator = FedRotAggregator(method="ffa-lora", on_invalid="drop")
    aggregator.add({key: x * torch.nan for key, x in start.items()})
    aggregator.add(start)
    assert list(aggregator.finish().report.dropped) == ["client 0"]


def test_clients_can_have_names(updates):
    aggregator = FedRotAggregator()
    assert aggregator.aggregate(updates, names=["Oslo", "Rome", "Kyiv"]).report.clients == ("Oslo", "Rome", "Kyiv")
    key = factor_keys(updates[0])[0][1]
    with refused("Rome", key, "NaN"):
        aggregator.aggregate([updates[0], {**updates[1], key: updates[1][key] * torch.nan}], names=["Oslo", "Rome"])
    for names in (["Oslo"], ["Oslo", "Oslo", "Rome"]):
        with refused("names"):
            aggregator.aggregate(updates, names=names)
