"""The client mod: aligned replies, averaged by Flower's own FedAvg, are the strategy's result."""

import inspect
import logging

import pytest
import torch
from flwr.app import ConfigRecord, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg

from fedrot import aggregate, align
from fedrot.flower import AlignMod, FedRot, align_mod, from_arrays, to_arrays

from ..peft_models import KINDS
from .local_grid import LocalGrid, client_app
from .strategy_runs import start_of

KIND = KINDS["modules to save"]
OPTIONS = [
    {},
    {"align_on": "A", "strength": 1.0},
    {"align_on": "B", "strength": 1.0, "reflections": True},
    {"align_on": "joint", "strength": 0.3},
]


def federation(kind, mods=None, **options):
    return LocalGrid({c: client_app(kind, mods=mods, **options) for c in range(3)})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["modules to save", "float64", "convolution", "DoRA on convolution and embedding"])
def test_plain_fedavg_of_aligned_replies_is_the_strategy(kind, options):
    """Over two rounds, of which one aligns B and one A."""
    kind = KINDS[kind]
    mod = AlignMod(**options) if options else align_mod
    start = to_arrays(start_of(kind))
    on_client = from_arrays(FedAvg(fraction_evaluate=0.0).start(federation(kind, [mod]), start, num_rounds=2).arrays)
    on_server = from_arrays(FedRot(fraction_evaluate=0.0, **options).start(federation(kind), start, num_rounds=2).arrays)
    assert on_client.keys() == on_server.keys() == start.keys()
    unaligned = from_arrays(FedAvg(fraction_evaluate=0.0).start(federation(kind), start, num_rounds=2).arrays)
    for key, x in on_client.items():
        # The client's rounding of the aligned factor, and FedAvg's of shares and sums, in both rounds.
        bound = 40 * torch.finfo(x.dtype).eps * float(x.abs().max())
        assert float((x - on_server[key]).abs().max()) <= bound
    assert any(float((x - unaligned[key]).abs().max()) > 1e-3 for key, x in on_client.items())


def test_bfloat16_is_aligned_too():
    grid, start = federation(KINDS["bfloat16"], [align_mod]), start_of(KINDS["bfloat16"])
    strategy = FedRot(strength=0.0, fraction_evaluate=0.0)
    on_client = from_arrays(strategy.start(grid, to_arrays(start), num_rounds=1).arrays)
    plain = federation(KINDS["bfloat16"])
    FedRot(fraction_evaluate=0.0).start(plain, to_arrays(start), num_rounds=1)
    updates = [from_arrays(m.content["arrays"]) for m in sorted(plain.received, key=lambda m: -m.metadata.src_node_id)]
    on_server = aggregate(updates, [1, 2, 3], start).state_dict
    assert on_client.keys() == on_server.keys() == start.keys()
    for key, x in on_client.items():
        assert x.dtype == torch.bfloat16
        assert float((x - on_server[key]).abs().max()) <= 2 * torch.finfo(x.dtype).eps * float(x.abs().max())


def asked(grid, content=None):
    """The reply of client 0 to a first round's message."""
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3)
    messages = strategy.configure_train(1, to_arrays(start_of(KIND)), ConfigRecord(), grid)
    message = next(m for m in messages if m.metadata.dst_node_id == 100)
    if content is not None:
        content(message)
    return grid.send_and_receive([message])[0]


def test_the_reply_is_fedrots_align_of_it():
    reply = asked(federation(KIND, [AlignMod(strength=1.0)]))
    plain = asked(federation(KIND))
    expected = align(from_arrays(plain.content["arrays"]), start_of(KIND), round=0, strength=1.0)
    found = from_arrays(reply.content["arrays"])
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[key]) for key, x in found.items())
    assert reply.content["metrics"].keys() == plain.content["metrics"].keys()


def drop_round(message):
    del message.content["config"]["server-round"]


def two_records(message):
    message.content["more"] = to_arrays({"x": torch.ones(2)})


@pytest.mark.parametrize(
    ("options", "content", "said"),
    [
        ({}, drop_round, ["server-round", "on_fit_config_fn"]),
        ({}, two_records, ["2 ArrayRecords"]),
        ({"keys": ["a", "b"]}, None, ["2 keys"]),
    ],
)
def test_what_cannot_be_aligned_becomes_an_error_reply(options, content, said, caplog):
    with caplog.at_level(logging.ERROR, "flwr"):
        reply = asked(federation(KIND, [AlignMod(**options)]), content)
    assert reply.has_error() and reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION
    assert all(part in reply.error.reason and part in caplog.text for part in said)


def test_other_errors_and_other_messages_pass():
    def broken(message):
        raise ValueError("no space")

    reply = asked(federation(KIND, [align_mod], spoil=broken))
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    grid = federation(KIND, [align_mod])
    strategy = FedAvg(min_evaluate_nodes=3)
    messages = strategy.configure_evaluate(1, to_arrays(start_of(KIND)), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    assert len(replies) == 3
    assert all(m.metadata.message_type == MessageType.EVALUATE and not m.has_error() for m in replies)


def test_options_are_checked():
    with pytest.raises(ValueError, match="strength"):
        AlignMod(strength=2.0)
    with pytest.raises(ValueError, match="align_on"):
        AlignMod(align_on="consensus")
    with pytest.raises(TypeError, match="seed plays no part on a client"):
        AlignMod(seed=1)
    assert list(inspect.signature(AlignMod).parameters) == ["keys", "align_on", "strength", "reflections"]
    for option, instead in (
        ({"align_on": "error"}, "fedrot-least-error"),
        ({"strength": "auto"}, "fedrot-adaptive"),
        ({"group": "O"}, "reflections=True"),
    ):
        with pytest.raises(ValueError, match=instead):
            AlignMod(**option)
