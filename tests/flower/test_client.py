"""What a client does with a message: every part of it goes into a PEFT model, or is refused by name."""

import subprocess
import sys

import pytest
import torch
from flwr.app import ConfigRecord
from peft import get_peft_model_state_dict

from fedrot import METHODS
from fedrot.flower import FedRot, from_arrays, receive, reply, to_arrays
from fedrot.keys import factor_of

from ..peft_models import KINDS
from ..refusals import refused
from .local_grid import LocalGrid, client_app, fresh_model
from .test_strategy import configs, options_of, start_of

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
    assert all(torch.equal(x, start_of(KINDS[kind])[key]) for key, x in get_peft_model_state_dict(model).items())


@pytest.mark.parametrize("method", METHODS)
def test_only_the_factors_of_the_round_are_trained(method):
    for round in (1, 2):
        model = fresh_model(KINDS["linear"])
        message, context = message_of(KINDS["linear"], round, **options_of(method, KINDS["linear"]))
        receive(model, message, context)
        trained = {factor_of(name) for name, p in model.named_parameters() if p.requires_grad}
        assert trained == set({"ffa-lora": "B", "rolora": "BA"[round - 1]}.get(method, "AB"))


def test_an_evaluation_freezes_nothing():
    model = fresh_model(KIND)
    receive(model, *message_of(evaluate=True, method="ffa-lora"))
    assert all(p.requires_grad for name, p in model.named_parameters() if factor_of(name))


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
        assert all(torch.equal(p, bases[1][name]) for name, p in bases[0].items())
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
    sent = from_arrays(message.content["arrays"])
    for key, x in get_peft_model_state_dict(again).items():
        assert torch.equal(x, mine[key] if factor_of(key) == "B" else sent[key])


def test_replies_carry_a_name_where_there_is_one():
    message, context = message_of()
    model = fresh_model(KIND)
    assert reply(model, message, context, {"num-examples": 1}).content["client"]["name"] == "client 0"
    assert (
        reply(model, message, context, {"num-examples": 1}, name="Sea hospital").content["client"]["name"] == "Sea hospital"
    )
    del context.node_config["partition-id"]
    assert "client" not in reply(model, message, context, {"num-examples": 1}).content


def test_fedrot_needs_no_flower():
    code = """
import sys
sys.modules["flwr"] = None
import fedrot, fedrot.cli, fedrot.simulation
try:
    import fedrot.flower
except ModuleNotFoundError as error:
    assert "pip install 'fedrot[flower]'" in str(error)
else:
    raise AssertionError("imported without Flower")
assert not any(name == "flwr" or name.startswith("flwr.") for name, m in sys.modules.items() if m)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
