"""Clients whose LoRA configurations make their factors mean other things are found by digests, named and left out."""

import json

import pytest
import torch
from flwr.app import ConfigRecord
from peft import get_peft_model_state_dict

import fedrot
from fedrot import UpdateError
from fedrot.agreement import explain_difference, find_unlike, read_digest, write_digest
from fedrot.flower import FedRot, from_arrays, receive, reply, to_arrays

from ..adapters.test_carried import COUNTER, Normed
from ..mixtures import EXPERTS
from ..peft_models import KINDS, Kind
from ..refusals import refused
from .local_grid import LocalGrid, client_app, fresh_model, train
from .strategy_runs import configs, start_of
from .test_client import message_of

KIND = KINDS["linear"]
BASE, CONFIG, COUNT = EXPERTS["Qwen3-MoE, all linear"]
pytestmark = [pytest.mark.filterwarnings("ignore:The following"), pytest.mark.filterwarnings("ignore:.*is a tied layer")]


def as_if(**fields):
    """A reply that says another LoRA configuration than it has."""

    def spoil(message):
        told = json.loads(message.content["client"]["lora-config"])
        message.content["client"]["lora-config"] = json.dumps(told | {key: json.dumps(x) for key, x in fields.items()})

    return spoil


def run(apps, **options):
    strategy = FedRot(fraction_evaluate=0.0, **options)
    strategy.start(LocalGrid(dict(enumerate(apps))), to_arrays(start_of(KIND)), num_rounds=1)
    return strategy.result.report


def test_a_client_of_another_configuration_is_left_out_by_name():
    odd = client_app(KIND, spoil=as_if(trainable_token_indices=[2, 7]))
    for known in ({}, {"configs": configs(KIND)}):
        report = run([client_app(KIND), odd, client_app(KIND)], **known)
        assert report.clients == ("client 0", "client 2")
        said = report.dropped["client 1"]
        assert all(part in said for part in ("trainable_token_indices = [2, 7]", "null", "LoRA configuration")), said


def test_most_clients_are_right_where_the_server_knows_nothing():
    odd = [client_app(KIND, spoil=as_if(init_lora_weights=["pissa", 4, None, None])) for _ in range(2)]
    assert run([client_app(KIND), *odd]).clients == ("client 1", "client 2")
    assert run([odd[0], client_app(KIND)]).clients == ("client 0",)  # of equally many, the first
    with refused("client 0", "init_lora_weights", "client 1"):
        run([client_app(KIND), *odd], on_invalid="raise")


@pytest.mark.parametrize("text", ["no json", "[1]", '{"a": 1}', json.dumps({"a": "x" * 9000})])
def test_a_digest_that_is_none_is_refused(text):
    def spoil(message):
        message.content["client"]["lora-config"] = text

    report = run([client_app(KIND), client_app(KIND, spoil=spoil)])
    assert report.clients == ("client 0",) and "digest" in report.dropped["client 1"]


def test_clients_that_say_nothing_are_taken_as_they_are():
    def spoil(message):
        del message.content["client"]["lora-config"]

    assert run([client_app(KIND, spoil=spoil), client_app(KIND)]).clients == ("client 0", "client 1")


def test_a_client_refuses_a_server_of_another_configuration():
    other = fresh_model(Kind(KIND.base, KIND.config | {"lora_alpha": 32}))
    message, context = message_of(KIND, configs=configs(KIND))
    with refused("this client has lora_alpha = 32", "the server has 8"):
        receive(other, message, context)
    receive(fresh_model(KIND), message, context)
    message.content["config"]["lora-config"] = "?"
    with refused("the server", "digest"):
        receive(fresh_model(KIND), message, context)
    receive(other, *message_of(KIND))  # a server that knows none


def test_a_reply_says_what_its_adapter_is():
    message, context = message_of(KIND)
    sent = reply(fresh_model(KIND), message, context, {"num-examples": 1}).content["client"]["lora-config"]
    assert sent == write_digest(fresh_model(KIND).peft_config["default"])
    assert isinstance(ConfigRecord({"lora-config": sent}), ConfigRecord)


def test_long_values_are_sent_as_hashes_that_differ():
    patterns = [{f"layers.{i}.q_proj": i + extra for i in range(99)} for extra in (1, 2)]
    texts = [write_digest({"peft_type": "LORA", "rank_pattern": pattern}) for pattern in patterns]
    assert max(map(len, texts)) < 2000
    mine, other = (read_digest(text, "it") for text in texts)
    assert "rank_pattern = sha256:" in explain_difference(mine, other, "you") and not explain_difference(mine, mine, "you")
    assert write_digest({"lora_alpha": 6.0}) == write_digest({"lora_alpha": 6})
    # A field that only one version of fedrot knows does not count.
    assert explain_difference(mine | {"new": "1"}, mine, "you") is None
    assert find_unlike({}) == {} and find_unlike({"a": mine, "b": other, "c": other}).keys() == {"a"}


@pytest.mark.parametrize("method", ["fedrot", "fedit", "flora", "fedex-lora", "fedsa-lora"])
def test_experts_on_flower(method):
    kind = Kind(BASE, CONFIG, torch.float64)
    start, lora = start_of(kind), fresh_model(kind).peft_config["default"]
    strategy = FedRot(method=method, configs=lora, fraction_evaluate=0.0)
    grid = LocalGrid({c: client_app(kind) for c in range(3)})
    strategy.start(grid, to_arrays(start), num_rounds=2)
    assert strategy.result.report.clients == ("client 0", "client 1", "client 2") and not strategy.result.report.dropped
    assert len(strategy.result.report.adapters) == COUNT
    if method in ("flora", "fedsa-lora"):
        return
    # The first round by hand: what the strategy makes of what its clients sent.
    sent = [message for message in grid.received if message.content["arrays"]][:3]
    by_node = sorted(sent, key=lambda m: -m.metadata.src_node_id)
    updates = [from_arrays(message.content["arrays"]) for message in by_node]
    expected = fedrot.aggregate(updates, [1, 2, 3], start, method=method, configs=lora)
    one = FedRot(method=method, configs=lora, fraction_evaluate=0.0)
    one.start(LocalGrid({c: client_app(kind) for c in range(3)}), to_arrays(start), num_rounds=1)
    assert all(torch.equal(one.result.state_dict[key], x) for key, x in expected.state_dict.items())


def test_experts_without_a_configuration_end_with_the_cure():
    kind = Kind(BASE, CONFIG)
    with pytest.raises(UpdateError, match="configs="):
        FedRot().start(LocalGrid({0: client_app(kind)}), to_arrays(start_of(kind)), num_rounds=1)


def test_counters_on_flower():
    kind = Kind(Normed, {"target_modules": ["body"], "modules_to_save": ["head"]})
    start = start_of(kind)
    assert start[COUNTER].dtype == torch.int64

    def steps(message):
        arrays = from_arrays(message.content["arrays"])
        arrays[COUNTER] = arrays[COUNTER] + int(message.content["metrics"]["num-examples"])
        message.content["arrays"] = to_arrays(arrays)

    strategy = FedRot(fraction_evaluate=0.0)
    strategy.start(LocalGrid({c: client_app(kind, spoil=steps) for c in range(3)}), to_arrays(start), num_rounds=2)
    assert strategy.result.state_dict[COUNTER] == start[COUNTER] + 6 and not strategy.result.report.dropped
    model = fresh_model(kind)
    message, context = message_of(kind)
    receive(model, message, context)
    train(model, 0, 1)
    assert get_peft_model_state_dict(model)[COUNTER] == start[COUNTER]


def test_a_compiled_client_is_one_of_the_federation():
    """Its keys have wrappers, which the server's lack."""
    plain, wrapped = fresh_model(KIND), fresh_model(KIND)
    body = wrapped.base_model.model.vit
    for i, layer in enumerate(body.layers):
        body.layers[i] = torch.compile(layer, backend="eager")
    assert any("_orig_mod" in key for key in get_peft_model_state_dict(wrapped))
    answers = []
    for model in (plain, wrapped):
        message, context = message_of(KIND)
        receive(model, message, context)
        train(model, 0, 1)
        answers.append(from_arrays(reply(model, message, context, {"num-examples": 1}).content["arrays"]))
    assert answers[0].keys() == answers[1].keys() == start_of(KIND).keys()
    assert all(torch.equal(x, answers[1][key]) for key, x in answers[0].items())
