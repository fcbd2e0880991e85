"""What a client does with a message: every part of it goes into a PEFT model, or is refused by name."""

import subprocess
import sys

import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from peft import get_peft_model_state_dict

from fedrot import METHODS
from fedrot.adapters.keys import factor_of
from fedrot.flower import FedRot, from_arrays, receive, reply, to_arrays

from ..peft_models import KINDS
from ..refusals import refused
from .local_grid import LocalGrid, client_app, fresh_model, train
from .strategy_runs import assert_equal, configs, options_of, start_of

KIND = KINDS["modules to save"]


def message_of(kind=KIND, round=1, evaluate=False, **options):
    """What client 0 is sent, and its context."""
    grid = LocalGrid({0: client_app(kind), 1: client_app(kind)})
    strategy = FedRot(**options)
    configure = strategy.configure_evaluate if evaluate else strategy.configure_train
    messages = configure(round, to_arrays(start_of(kind)), ConfigRecord(), grid)
    return next(m for m in messages if m.metadata.dst_node_id == 100), grid.contexts[100]


@pytest.mark.parametrize("kind", ["linear", "bfloat16", "convolution", "DoRA", "modules to save", "embedding"])
def test_the_adapter_sent_is_the_models(kind):
    model = fresh_model(KINDS[kind])
    receive(model, *message_of(KINDS[kind]))
    assert_equal(get_peft_model_state_dict(model), start_of(KINDS[kind]))


@pytest.mark.parametrize("method", METHODS)
def test_only_the_factors_of_the_round_are_trained(method):
    for round in (1, 2):
        model = fresh_model(KINDS["linear"])
        message, context = message_of(KINDS["linear"], round, **options_of(method, KINDS["linear"]))
        receive(model, message, context)
        trained = {factor_of(name) for name, p in model.named_parameters() if p.requires_grad}
        assert trained == set({"ffa-lora": "B", "fedsvd": "B", "rolora": "BA"[round - 1]}.get(method, "AB"))


def test_an_evaluation_freezes_nothing():
    model = fresh_model(KIND)
    receive(model, *message_of(evaluate=True, method="ffa-lora"))
    trained = [p.requires_grad for name, p in model.named_parameters() if factor_of(name)]
    assert trained and all(trained)


def test_another_models_adapter_is_refused():
    other = fresh_model(KINDS["linear"])
    with refused("no such key"):
        receive(other, *message_of())
    message, context = message_of()
    key = next(key for key in message.content["arrays"] if factor_of(key) == "B")
    message.content["arrays"][key] = to_arrays({"x": torch.ones(16, 2)})["x"]
    with refused(key, "(16, 2)", "(16, 4)"):
        receive(fresh_model(KIND), message, context)
    message.content["more"] = to_arrays({"x": torch.ones(1)})
    with refused("2 ArrayRecords"):
        receive(fresh_model(KIND), message, context)


def test_base_updates_are_folded_once_into_a_model_that_stays():
    kind = KINDS["linear"]
    grid = LocalGrid({c: client_app(kind) for c in range(3)})
    strategy = FedRot(method="flora", configs=configs(kind), fraction_evaluate=0.0)
    strategy.start(grid, to_arrays(start_of(kind)), num_rounds=1)
    kept = fresh_model(kind)
    for rounds_done in (1, 2):
        arrays = to_arrays(start_of(kind))
        message = strategy.configure_train(rounds_done + 1, arrays, ConfigRecord(), grid)[0]
        fresh = fresh_model(kind)
        for model in (kept, kept, fresh):
            receive(model, message, grid.contexts[message.metadata.dst_node_id])
        bases = [{n: p for n, p in m.named_parameters() if ".base_layer." in n} for m in (kept, fresh)]
        assert_equal(*bases)
        assert any(not torch.equal(p, dict(fresh_model(kind).named_parameters())[name]) for name, p in bases[0].items())
        strategy.base_updates.append({key: 2 * x for key, x in strategy.base_updates[0].items()})


def test_a_clients_own_factors_come_back_from_its_state():
    message, context = message_of(KINDS["linear"], method="fedsa-lora")
    model = fresh_model(KINDS["linear"])
    receive(model, message, context)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0 if p.requires_grad else 0.0)
    answer = reply(model, message, context, {"num-examples": 5})
    mine = {key: x.clone() for key, x in get_peft_model_state_dict(model).items()}
    assert list(from_arrays(answer.content["arrays"])) == [key for key in mine if factor_of(key) == "A"]
    message, _ = message_of(KINDS["linear"], round=2, method="fedsa-lora")
    for key in [key for key in message.content["arrays"] if factor_of(key) == "B"]:
        del message.content["arrays"][key]  # as the strategy's second round has it
    again = fresh_model(KINDS["linear"])
    receive(again, message, context)
    assert_equal(
        get_peft_model_state_dict(again),
        {key: x for key, x in mine.items() if factor_of(key) == "B"} | from_arrays(message.content["arrays"]),
    )


def test_a_model_that_serves_many_gives_none_the_others_factors():
    kind = KINDS["linear"]
    shared = fresh_model(kind)
    first = {key: x.clone() for key, x in get_peft_model_state_dict(shared).items()}
    found = []
    for client in (0, 1):
        message, context = message_of(kind, round=2, method="fedsa-lora")
        for key in [key for key in message.content["arrays"] if factor_of(key) == "B"]:
            del message.content["arrays"][key]
        receive(shared, message, context)
        found.append({key: x.clone() for key, x in get_peft_model_state_dict(shared).items() if factor_of(key) == "B"})
        train(shared, client, 2)
        reply(shared, message, context, {"num-examples": 1})
    expected = {key: x for key, x in first.items() if factor_of(key) == "B"}
    assert expected
    for own in found:
        assert_equal(own, expected)


def test_base_updates_of_another_run_are_refused():
    kind = KINDS["linear"]
    grid = LocalGrid({c: client_app(kind) for c in range(3)})
    strategy = FedRot(method="flora", configs=configs(kind), fraction_evaluate=0.0)
    strategy.start(grid, to_arrays(start_of(kind)), num_rounds=1)
    message = strategy.configure_train(2, to_arrays(start_of(kind)), ConfigRecord(), grid)[0]
    model, context = fresh_model(kind), grid.contexts[message.metadata.dst_node_id]
    receive(model, message, context)
    another = Context(2, context.node_id, context.node_config, RecordDict(), {})
    with refused("1 base updates of another run"):
        receive(model, message, another)
    first, _ = message_of(kind, method="flora", configs=configs(kind))
    with refused("1 base updates of another run"):
        receive(model, first, context)


def test_the_active_adapter_is_the_one_and_others_are_left_alone():
    kind = KINDS["linear"]
    model = fresh_model(kind)
    model.add_adapter("hospital", model.peft_config["default"])
    for name, p in model.named_parameters():
        p.requires_grad_(".default." in name and "lora_" in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    model.set_adapter("hospital")
    others = next(name for name in before if factor_of(name) == "A")
    model.get_parameter(others).requires_grad_()
    message, context = message_of(kind, method="ffa-lora")
    receive(model, message, context)
    assert model.get_parameter(others).requires_grad
    trained = {name for name, p in model.named_parameters() if p.requires_grad} - {others}
    assert trained and all(".hospital." in name and factor_of(name) == "B" for name in trained)
    assert before
    assert_equal({name: p.detach() for name, p in model.named_parameters() if name in before}, before)
    sent = from_arrays(reply(model, message, context, {"num-examples": 1}).content["arrays"])
    assert_equal(sent, start_of(kind))
    model.base_model.set_adapter(["default", "hospital"])
    with refused("default, hospital"):
        receive(model, message, context)


def test_what_was_frozen_for_a_round_is_trained_in_the_next_and_nothing_else():
    kind = KINDS["linear"]
    model = fresh_model(kind)
    users = next(name for name, _ in model.named_parameters() if factor_of(name) == "B")
    model.get_parameter(users).requires_grad_(False)
    for method, round, expected in (("rolora", 1, "B"), ("rolora", 2, "A"), ("ffa-lora", 3, "B"), ("fedit", 1, "AB")):
        receive(model, *message_of(kind, round, method=method))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {factor_of(name) for name in trained} == set(expected) and users not in trained
    receive(model, *message_of(kind, method="ffa-lora"))
    receive(model, *message_of(kind, evaluate=True, method="ffa-lora"))
    assert {factor_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}


@pytest.mark.parametrize("method", ["rolora", "ffa-lora", "fedrot"])
def test_answers_have_the_dtypes_in_which_they_were_sent(method):
    """Of a bfloat16 model that is sent float32: a frozen factor comes back to the bit, though the model cannot hold it."""
    kind = KINDS["bfloat16"]
    grid = LocalGrid({c: client_app(kind) for c in range(3)})
    strategy = FedRot(method=method, fraction_evaluate=0.0)
    result = strategy.start(grid, to_arrays(start_of(kind), widen=True), num_rounds=4)
    assert strategy.result.report.dropped == {}
    assert {x.dtype for x in from_arrays(result.arrays).values()} == {torch.float32}


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_trained_biases_stay_where_the_base_is_changed(method):
    kind = KINDS["bias of adapted layers"]
    grid = LocalGrid({c: client_app(kind) for c in range(3)})
    strategy = FedRot(method=method, configs=configs(kind), fraction_evaluate=0.0)
    result = strategy.start(grid, to_arrays(start_of(kind)), num_rounds=2)
    biases = [key for key in start_of(kind) if key.endswith("base_layer.bias") or key.endswith("query.bias")]
    assert biases and strategy.result.report.dropped == {}
    found = from_arrays(result.arrays)
    sent = sorted(grid.received[3:], key=lambda m: -m.metadata.src_node_id)
    for key in biases:
        of_clients = [from_arrays(m.content["arrays"])[key].double() for m in sent]
        expected = sum(w * x for w, x in zip((1, 2, 3), of_clients, strict=True)) / 6
        torch.testing.assert_close(found[key].double(), expected, rtol=0, atol=1e-6)
        assert not torch.equal(found[key], start_of(kind)[key])


def test_an_embedding_saved_with_its_base_takes_base_updates():
    kind = KINDS["embedding, saved with its base"]
    for method in ("flora", "fedex-lora"):
        grid = LocalGrid({c: client_app(kind) for c in range(3)})
        strategy = FedRot(method=method, configs=configs(kind), fraction_evaluate=0.0)
        strategy.start(grid, to_arrays(start_of(kind)), num_rounds=3)
        assert strategy.result.report.dropped == {}
        assert strategy.result.report.clients == ("client 0", "client 1", "client 2")


def test_an_evaluation_is_answered_without_arrays():
    message, context = message_of(evaluate=True)
    model = fresh_model(KIND)
    receive(model, message, context)
    answer = reply(model, message, context, {"num-examples": 3, "accuracy": 0.5})
    assert list(answer.content) == ["metrics", "client"]


def test_replies_carry_a_name_where_there_is_one():
    message, context = message_of()
    model = fresh_model(KIND)
    assert reply(model, message, context, {"num-examples": 1}).content["client"]["name"] == "client 0"
    assert (
        reply(model, message, context, {"num-examples": 1}, name="Sea hospital").content["client"]["name"] == "Sea hospital"
    )
    del context.node_config["partition-id"]
    assert "name" not in reply(model, message, context, {"num-examples": 1}).content["client"]


def test_fedrot_needs_no_flower():
    code = """
import sys
sys.modules["flwr"] = None
import fedrot, fedrot.cli
try:
    import fedrot.flower
except ModuleNotFoundError as error:
    assert "pip install 'fedrot[flower]'" in str(error)
else:
    raise AssertionError("imported without Flower")
assert not any(name == "flwr" or name.startswith("flwr.") for name, m in sys.modules.items() if m)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
