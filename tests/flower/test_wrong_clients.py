"""Clients that answer wrongly, or not at all: dropped by name, never averaged, never the end of the run."""

import logging
import math

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord
from flwr.common.constant import ErrorCode
from flwr.serverapp.exception import AggregationError

from fedrot import ServerOptimizer, UpdateError
from fedrot.adapters.keys import factor_of
from fedrot.flower import FedRot, from_arrays, to_arrays

from ..peft_models import KINDS
from .local_grid import LocalGrid, client_app, fresh_model
from .strategy_runs import assert_equal, start_of
from .wrong_replies import HEAD, KEY, KIND, changed, metrics, run, with_entry


def without(record):
    def spoil(message):
        del message.content[record]

    return spoil


def another(record, value):
    def spoil(message):
        message.content[record] = value

    return spoil


def raises(message):
    raise ValueError("the disk is full")


WRONG = {
    "another key": (changed(lambda s: s | {"base_model.model.extra.weight": torch.ones(2)}), ["extra.weight"]),
    "a key less": (changed(lambda s: {k: x for k, x in s.items() if k != KEY}), [KEY.rsplit(".", 2)[0]]),
    "another shape": (changed(lambda s: s | {HEAD: torch.ones(5, 16)}), [HEAD, "(5, 16)", "(3, 16)"]),
    "another rank": (
        changed(lambda s: {k: x[:2] if factor_of(k) == "A" else x[:, :2] if factor_of(k) else x for k, x in s.items()}),
        ["(2, 16)", "(4, 16)"],
    ),
    "another dtype": (changed(lambda s: {k: x.double() for k, x in s.items()}), ["float64", "float32"]),
    "integers": (another("arrays", ArrayRecord([torch.arange(3).numpy().astype(complex)])), ["complex128 (3,)"]),
    "NaN in a factor": (with_entry(KEY, math.nan), [KEY, "NaN"]),
    "Inf in a head": (with_entry(HEAD, math.inf), [HEAD, "Inf"]),
    "values that overflow": (with_entry(KEY, 1e30), [KEY, "(4, 16)", "1.0e+30"]),
    "nothing": (another("arrays", ArrayRecord()), ["lora_A"]),
    "no arrays": (without("arrays"), ["0 ArrayRecords"]),
    "two adapters": (another("more", to_arrays({"x": torch.ones(1)})), ["2 ArrayRecords"]),
    "no metrics": (without("metrics"), ["0 MetricRecords"]),
    "no example count": (metrics(loss=1.0), ["num-examples", "None"]),
    "a list of counts": (metrics(num_examples=[1, 2]), ["num-examples", "[1, 2]"]),
    "a negative count": (metrics(num_examples=-3), ["num-examples", "-3"]),
    "an infinite count": (metrics(num_examples=math.inf), ["num-examples", "inf"]),
    "an exception": (raises, ["error 2", "the disk is full"]),
}


def without_client_1():
    """What the others alone give."""
    grid = LocalGrid({0: client_app(KIND), 2: client_app(KIND)})
    return FedRot(fraction_evaluate=0.0).start(grid, to_arrays(start_of(KIND)), num_rounds=1)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_reply_is_dropped_and_named(what, caplog):
    spoil, said = WRONG[what]
    with caplog.at_level(logging.WARNING, "flwr"):
        result, strategy = run(spoil)
    dropped = strategy.result.report.dropped
    # An app that raised did not get to say its name.
    name = "node 99" if what == "an exception" else "client 1"
    assert list(dropped) == [name]
    logged = [r.getMessage() for r in caplog.records if "dropped" in r.getMessage()]
    assert len(logged) == 1
    assert all(part in logged[0] for part in [name, *said])
    assert strategy.result.report.clients == ("client 0", "client 2")
    assert_equal(from_arrays(result.arrays), from_arrays(without_client_1().arrays))
    recorded = result.train_metrics_clientapp[1]
    assert (recorded["clients"], recorded["dropped"]) == (2, 1)
    assert recorded["train-loss"] == pytest.approx((0 * 1 + 1.0 * 3) / 4)


@pytest.mark.parametrize("what", [what for what in WRONG if what != "an exception"])
def test_a_wrong_reply_is_an_error_where_that_is_the_policy(what):
    spoil, said = WRONG[what]
    with pytest.raises(UpdateError) as caught:
        run(spoil, on_invalid="raise")
    assert all(part in str(caught.value) for part in said)


def test_a_trained_frozen_factor_is_dropped():
    spoil = changed(lambda s: {k: x + 1 if factor_of(k) == "A" else x for k, x in s.items()})
    _, strategy = run(spoil, method="ffa-lora")
    assert "frozen" in strategy.result.report.dropped["client 1"]


def test_flowers_own_answer_and_silence_name_the_client_that_answered_before():
    apps = {c: client_app(KIND) for c in range(4)}
    grid = LocalGrid(apps)
    strategy = FedRot(fraction_evaluate=0.0, min_train_nodes=4)
    strategy.start(grid, to_arrays(start_of(KIND)), num_rounds=1)
    assert strategy.result.report.dropped == {}
    grid.apps[100 - 3], grid.apps[100 - 1] = Error(ErrorCode.NODE_UNAVAILABLE, "gone"), None
    strategy.start(grid, to_arrays(start_of(KIND)), num_rounds=1)
    assert strategy.result.report.dropped == {"client 1": "no reply in time", "client 3": "error 5: gone"}
    assert strategy.result.report.clients == ("client 0", "client 2")


def test_the_run_ends_only_when_too_few_remain():
    spoil = with_entry(KEY, math.nan)
    grid = LocalGrid({c: client_app(KIND, spoil=spoil if c else None) for c in range(3)})
    assert FedRot(fraction_evaluate=0.0).start(grid, to_arrays(start_of(KIND)), num_rounds=3).arrays
    with pytest.raises(AggregationError) as caught:
        FedRot(fraction_evaluate=0.0, min_train_replies=2).start(grid, to_arrays(start_of(KIND)), num_rounds=3)
    for part in ("round 1", "1 good", "min_train_replies is 2", "client 1", "client 2", KEY):
        assert part in str(caught.value)


@pytest.mark.parametrize("method", ["fedit", "flexlora", "fedsa-lora", "lora-fair", "scalar"])
def test_extreme_clients_end_no_method(method):
    for value in (1e30, -3e38, 1e-42):
        result, strategy = run(with_entry(KEY, value), method=method)
        assert result.arrays
        assert all(bool(x.isfinite().all()) for x in from_arrays(result.arrays).values())
        assert len(strategy.result.report.dropped) == (abs(value) > 1)


def test_a_reply_of_a_client_without_fedrot_is_taken():
    """Plain Flower: ArrayRecord(state_dict), any record names, and no client record."""

    def spoil(message):
        state = from_arrays(message.content["arrays"])
        for record in ("arrays", "client", "metrics"):
            del message.content[record]
        message.content["model"] = ArrayRecord(dict(state))
        message.content["m"] = MetricRecord({"num-examples": 2, "train-loss": 0.5})
        message.content["extra"] = ConfigRecord({"note": "hello"})

    _, strategy = run(spoil)
    assert strategy.result.report.dropped == {}
    assert strategy.result.report.clients == ("client 0", "client 2", "node 99")


@pytest.mark.parametrize("method", ["flexlora", "flora"])
def test_ranks_do_not_differ(method):
    """A larger one would become everyone's, and clients receive the server's."""
    _, strategy = run(WRONG["another rank"][0], method=method, configs=fresh_model(KIND).peft_config["default"])
    assert "(2, 16)" in strategy.result.report.dropped["client 1"]


def test_what_a_client_calls_its_tensors_is_nothing_to_the_others():
    def named(change):
        return changed(lambda s: {change(key): x for key, x in reversed(s.items())})

    def in_model(key):
        return key.replace("lora_A.weight", "lora_A.mine.weight").replace("lora_B.weight", "lora_B.mine.weight")

    expected, _ = run(None, rounds=3)
    grid = LocalGrid({0: client_app(KIND, spoil=named(in_model)), 1: client_app(KIND), 2: client_app(KIND)})
    strategy = FedRot(fraction_evaluate=0.0)
    result = strategy.start(grid, to_arrays(start_of(KIND)), num_rounds=3)
    assert strategy.result.report.dropped == {}
    assert list(result.arrays) == list(start_of(KIND))
    assert_equal(from_arrays(result.arrays), from_arrays(expected.arrays))


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_extreme_heads_poison_no_server_optimizer(optimizer):
    spoil = with_entry(HEAD, 3.4e38)
    optimizer = ServerOptimizer(optimizer, 0.1)
    _, strategy = run(spoil, server_optimizer=optimizer)
    assert list(strategy.result.report.dropped) == ["client 1"]
    state = optimizer.state_dict()
    assert state and all(bool(x.isfinite().all()) for x in state.values())


def test_the_client_that_makes_the_aggregate_overflow_is_dropped():
    """float16: everyone's entries fit, but not what they are rotated to."""
    kind = KINDS["float16"]

    def spoil(message):
        state = from_arrays(message.content["arrays"])
        large = {k: torch.full_like(x, 60000.0) if factor_of(k) else x for k, x in state.items()}
        message.content["arrays"] = to_arrays(large)
        message.content["metrics"] = MetricRecord({"num-examples": 10000, "train-loss": 0.5})

    def federation():
        return LocalGrid({0: client_app(kind), 1: client_app(kind, spoil=spoil), 2: client_app(kind)})

    strategy = FedRot(fraction_evaluate=0.0)
    result = strategy.start(federation(), to_arrays(start_of(kind)), num_rounds=1)
    assert strategy.result.report.clients == ("client 0", "client 2")
    assert "largest" in strategy.result.report.dropped["client 1"]
    assert result.arrays
    assert all(bool(x.isfinite().all()) for x in from_arrays(result.arrays).values())
    with pytest.raises(UpdateError):
        FedRot(fraction_evaluate=0.0, on_invalid="raise").start(federation(), to_arrays(start_of(kind)), num_rounds=1)


def test_clients_without_examples_are_too_few_and_named():
    for counts, least, idle in (((0, 0, 0), 1, (0, 1, 2)), ((0, 5, 0), 2, (0, 2))):
        grid = LocalGrid({c: client_app(KIND, spoil=metrics(num_examples=n)) for c, n in enumerate(counts)})
        strategy = FedRot(fraction_evaluate=0.0, min_train_replies=least)
        with pytest.raises(AggregationError) as caught:
            strategy.start(grid, to_arrays(start_of(KIND)), num_rounds=1)
        said = str(caught.value)
        assert f"{3 - len(idle)} good answers with examples, but min_train_replies is {least}" in said
        assert [c for c in range(3) if f"client {c}: its number of examples is 0" in said] == [*idle]


def test_a_personal_factor_that_is_sent_is_refused():
    state = start_of(KIND)
    _, strategy = run(changed(lambda s: s | {k: x for k, x in state.items() if factor_of(k) == "B"}), method="fedsa-lora")
    assert "keep it" in strategy.result.report.dropped["client 1"]
