"""The strategy against the aggregator that it stands for, over real messages and ClientApps."""

import inspect
import json
import logging
import re

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedrot import METHODS, FedRotAggregator, ServerOptimizer, UpdateError, fold
from fedrot.adapters.keys import factor_of
from fedrot.flower import FedRot, from_arrays, to_arrays
from fedrot.options import OPTION_NAMES, AggregationOptions
from fedrot.server.checkpoint import save_checkpoint

from ..peft_models import KINDS
from .local_grid import LocalGrid, client_app, fresh_model, train

KIND = KINDS["linear"]
ROUNDS, CLIENTS = 3, 3
WEIGHTS = [1.0, 2.0, 3.0]


def start_of(kind):
    """An adapter whose B is not zero, as after a round, so that the first aggregation has something to align with."""
    model = fresh_model(kind)
    train(model, 77, 0)
    return {key: x.clone() for key, x in get_peft_model_state_dict(model).items()}


def in_process(kind, rounds=ROUNDS, **options):
    """Every round's start and result of the aggregator alone, with the same training, and the folded model."""
    aggregator = FedRotAggregator(start_of(kind), **options)
    model, state, own = fresh_model(kind), start_of(kind), {}
    results = []
    for round in range(rounds):
        trained, updates = aggregator.method.trains(round), []
        for client in range(CLIENTS):
            mine = {key: state.get(key, own.get((client, key))) for key in get_peft_model_state_dict(model)}
            set_peft_model_state_dict(model, mine)
            for name, p in model.named_parameters():
                if factor_of(name):
                    p.requires_grad_(factor_of(name) in trained)
            train(model, client, round + 1)
            updates.append({key: x.clone() for key, x in get_peft_model_state_dict(model).items()})
        result = aggregator.aggregate(updates, WEIGHTS)
        own = {(c, key): updates[c][key] for c in range(CLIENTS) for key in result.personal}
        fold(model, result)
        state = result.state_dict
        results.append(result)
    return results, model


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(x.dtype == expected[key].dtype and torch.equal(x, expected[key]) for key, x in found.items())


def on_flower(kind, rounds=ROUNDS, strategy=None, arrival=0, **options):
    strategy = strategy or FedRot(fraction_evaluate=0.0, **options)
    grid = LocalGrid({c: client_app(kind) for c in range(CLIENTS)}, arrival)
    return strategy.start(grid, to_arrays(start_of(kind)), num_rounds=rounds), strategy


def configs(kind):
    return fresh_model(kind).peft_config["default"]


def options_of(method, kind):
    stacks = METHODS[method].unequal_ranks == "stack"
    return {"method": method, "configs": configs(kind)} if stacks else {"method": method}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_aggregators_to_the_bit(method):
    options = options_of(method, KIND)
    expected, folded = in_process(KIND, **options)
    result, strategy = on_flower(KIND, **options)
    assert_equal(from_arrays(result.arrays), expected[-1].state_dict)
    model = fresh_model(KIND)
    strategy.fold_into(model)
    bases = [{n: p for n, p in m.named_parameters() if ".base_layer." in n} for m in (model, folded)]
    assert bases[0]
    assert_equal(*bases)
    assert len(strategy.base_updates) == (ROUNDS if METHODS[method].updates_base else 0)
    for round, reported in enumerate(expected, 1):
        metrics = result.train_metrics_clientapp[round]
        assert metrics["train-loss"] == pytest.approx((0 * 1 + 0.5 * 2 + 1.0 * 3) / 6)
        assert (metrics["clients"], metrics["dropped"]) == (3, 0)
        assert metrics["rotation-angle"] == reported.report.angle
        assert metrics["rotation-angle-max"] == max(angle for a in reported.report.adapters for angle in a.angles)
        if method != "fedsa-lora":  # whose B the server never sees
            assert metrics["aggregation-error"] == reported.report.error
            assert metrics["relative-error"] == reported.report.relative_error
    rotates = "reflections" in METHODS[method].uses
    assert (result.train_metrics_clientapp[2]["rotation-angle"] > 1) == rotates


def test_a_personal_factor_is_not_sent():
    grid = LocalGrid({c: client_app(KIND) for c in range(CLIENTS)})
    FedRot(method="fedsa-lora", fraction_evaluate=0.0).start(grid, to_arrays(start_of(KIND)), num_rounds=2)
    sent = [key for message in grid.received for key in message.content["arrays"]]
    assert sent and not any(factor_of(key) == "B" for key in sent)


@pytest.mark.parametrize(
    "options",
    [
        {"strength": 1.0, "align_on": "joint", "reflections": True},
        {"align_on": "A"},
        {"method": "fedrot-consensus", "align_on": "B", "strength": 0.5},
        {"method": "fedrot-adaptive", "align_on": "joint"},
        {"method": "fedrot-least-error", "reflections": True},
        {"report_error": False},
        {"server_optimizer": ("adam", 0.1)},
        {"server_optimizer": ("momentum", 0.5)},
        {"method": "random-rotation", "seed": 5},
    ],
    ids=str,
)
def test_options_are_the_aggregators(options):
    def fresh():
        return options | ({"server_optimizer": ServerOptimizer(*o)} if (o := options.get("server_optimizer")) else {})

    expected, _ = in_process(KIND, **fresh())
    result, strategy = on_flower(KIND, **fresh())
    assert_equal(from_arrays(result.arrays), expected[-1].state_dict)
    assert strategy.result.report == expected[-1].report


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "convolution", "DoRA"])
def test_kinds_and_dtypes_travel(kind):
    expected, _ = in_process(KINDS[kind], rounds=2)
    result, _ = on_flower(KINDS[kind], rounds=2)
    state = from_arrays(result.arrays)
    assert_equal(state, expected[-1].state_dict)
    assert {x.dtype for x in state.values()} == {KINDS[kind].dtype}


def test_the_order_of_arrival_does_not_matter():
    states = [from_arrays(on_flower(KIND, arrival=n)[0].arrays) for n in range(4)]
    for other in states[1:]:
        assert_equal(other, states[0])


@pytest.mark.parametrize("method", ["fedrot", "fedrot-adaptive", "flora", "rolora"])
@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_a_restart_at_round_n_ends_with_the_same_bits(method, optimizer, tmp_path):
    folds = METHODS[method].updates_base
    if optimizer and folds:
        with pytest.raises(ValueError, match="server optimizer"):
            FedRot(server_optimizer=ServerOptimizer(optimizer, 0.1), **options_of(method, KIND))
        return

    def strategy(**options):
        made = ServerOptimizer(optimizer, 0.1) if optimizer else None
        return FedRot(fraction_evaluate=0.0, server_optimizer=made, **options_of(method, KIND), **options)

    whole, _ = on_flower(KIND, rounds=4, strategy=strategy())
    on_flower(KIND, rounds=2, strategy=strategy(checkpoint=tmp_path / "run"))
    seen = []
    resumed = strategy(checkpoint=tmp_path / "run", resume=True)
    grid = LocalGrid({c: client_app(KIND) for c in range(CLIENTS)})
    result = resumed.start(
        grid,
        to_arrays(start_of(KIND)),
        4,
        evaluate_fn=lambda round, arrays: seen.append(round) or MetricRecord({"x": round}),
    )
    assert seen == [3, 4]
    assert list(result.train_metrics_clientapp) == list(result.evaluate_metrics_serverapp) == [3, 4]
    assert_equal(from_arrays(result.arrays), from_arrays(whole.arrays))
    assert len(resumed.base_updates) == (4 if folds else 0)
    done, _ = on_flower(KIND, rounds=4, strategy=strategy(checkpoint=tmp_path / "run", resume=True))
    assert_equal(from_arrays(done.arrays), from_arrays(whole.arrays))


def test_evaluation_averages_what_clients_measure_and_sees_base_and_own_factors():
    for method in ("fedrot", "flora", "fedsa-lora"):
        grid = LocalGrid({c: client_app(KIND) for c in range(CLIENTS)})
        strategy = FedRot(**options_of(method, KIND))
        result = strategy.start(grid, to_arrays(start_of(KIND)), num_rounds=2)
        assert strategy.train_metrics == result.train_metrics_clientapp[2]
        assert strategy.evaluate_metrics == result.evaluate_metrics_clientapp[2]
        assert result.evaluate_metrics_clientapp[2]["size"] > 0
        assert "num-examples" not in result.evaluate_metrics_clientapp[2]


def test_the_reference_is_what_was_sent_not_the_last_result():
    """As under a wrapper that adds noise to the aggregate before it is sent."""
    strategy = FedRot(strength=1.0, align_on="A", fraction_evaluate=0.0)
    grid = LocalGrid({c: client_app(KIND) for c in range(CLIENTS)})
    first = to_arrays(start_of(KIND))
    strategy.aggregate_train(1, grid.send_and_receive(strategy.configure_train(1, first, ConfigRecord(), grid)))
    other = {key: x + 1 for key, x in start_of(KIND).items()}
    replies = grid.send_and_receive(strategy.configure_train(2, ArrayRecord(dict(to_arrays(other))), ConfigRecord(), grid))
    arrays, _ = strategy.aggregate_train(2, replies)
    updates = [from_arrays(r.content["arrays"]) for r in sorted(replies, key=lambda r: -r.metadata.src_node_id)]
    expected = FedRotAggregator(other, round=1, strength=1.0, align_on="A").aggregate(updates, WEIGHTS)
    assert_equal(from_arrays(arrays), expected.state_dict)


def test_a_strategy_runs_again_as_for_the_first_time():
    strategy = FedRot(fraction_evaluate=0.0, server_optimizer=ServerOptimizer("adam", 0.1))
    first, second = (from_arrays(on_flower(KIND, strategy=strategy)[0].arrays) for _ in range(2))
    assert_equal(second, first)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"method": "rolora"}, "method fedrot"),
        ({"strength": 1.0}, "strength 0.5"),
        ({"reflections": True}, "reflections False"),
        ({"seed": 1}, "seed 0"),
        ({"server_optimizer": None}, "server_optimizer"),
        ({"server_optimizer": ServerOptimizer("adam", 0.2)}, "0.1"),
    ],
    ids=["method", "strength", "reflections", "seed", "no optimizer", "its learning rate"],
)
def test_another_run_is_not_resumed(other, said, tmp_path):
    options = {"fraction_evaluate": 0.0, "checkpoint": tmp_path, "server_optimizer": ServerOptimizer("adam", 0.1)}
    on_flower(KIND, strategy=FedRot(**options))
    with pytest.raises(ValueError, match=said):
        on_flower(KIND, rounds=5, strategy=FedRot(**options | other, resume=True))


def test_options_that_change_no_result_may_differ_when_resuming(tmp_path):
    on_flower(KIND, rounds=1, strategy=FedRot(fraction_evaluate=0.0, checkpoint=tmp_path))
    others = {"backend": "torch", "report_error": False, "on_invalid": "raise"}
    result, _ = on_flower(KIND, strategy=FedRot(fraction_evaluate=0.0, checkpoint=tmp_path, resume=True, **others))
    expected = from_arrays(on_flower(KIND)[0].arrays)
    for key, x in from_arrays(result.arrays).items():  # backends round differently
        assert (x - expected[key]).abs().max() <= 1e-5 * expected[key].abs().max()


def test_a_checkpoint_of_fedrot_0_1_is_refused(tmp_path):
    options = {"method": "fedrot", "reference": "global", "align_on": "alternate", "group": "SO", "seed": 0, "strength": 0.5}
    tensors = {f"adapter/{key}": x for key, x in start_of(KIND).items()}
    save_checkpoint(tmp_path, tensors, 2, options=json.dumps(options | {"server_optimizer": None}))
    with pytest.raises(ValueError, match=r"checkpoint of fedrot 0\.1.* finish that run with fedrot 0\.1, or start another"):
        on_flower(KIND, strategy=FedRot(fraction_evaluate=0.0, checkpoint=tmp_path, resume=True))


def test_a_checkpoint_of_a_simulation_is_refused(tmp_path):
    save_checkpoint(tmp_path, {f"state/{key}": x for key, x in start_of(KIND).items()}, 2)
    with pytest.raises(ValueError, match="method None"):
        on_flower(KIND, strategy=FedRot(fraction_evaluate=0.0, checkpoint=tmp_path, resume=True))


def test_resuming_without_a_checkpoint_says_that_it_starts_anew(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "flwr"):
        on_flower(KIND, rounds=1, strategy=FedRot(fraction_evaluate=0.0, checkpoint=tmp_path, resume=True))
    assert f"no checkpoint in {tmp_path}" in caplog.text


def test_a_checkpoint_of_another_adapter_is_not_resumed(tmp_path):
    on_flower(KIND, strategy=FedRot(fraction_evaluate=0.0, checkpoint=tmp_path))
    other = {key: x[:2] if factor_of(key) == "A" else x[:, :2] for key, x in start_of(KIND).items()}
    grid = LocalGrid({c: client_app(KIND) for c in range(CLIENTS)})
    with pytest.raises(UpdateError, match=r"\(4, 16\).*\(2, 16\)"):
        FedRot(checkpoint=tmp_path, resume=True).start(grid, to_arrays(other), 5)
    more = {**start_of(KIND), "base_model.model.classifier.weight": torch.ones(3, 16)}
    with pytest.raises(UpdateError, match=r"lacks base_model\.model\.classifier\.weight"):
        FedRot(checkpoint=tmp_path, resume=True).start(grid, to_arrays(more), 5)


def test_a_wrapped_strategy_warns_and_overwrites_no_checkpoint(tmp_path, caplog):
    grid = LocalGrid({c: client_app(KIND) for c in range(CLIENTS)})

    def wrapped():
        inner = FedRot(fraction_evaluate=0.0, checkpoint=tmp_path)
        return DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 100.0, CLIENTS)

    wrapped().start(grid, to_arrays(start_of(KIND)), 1)
    assert "align_mod" in caplog.text
    with pytest.raises(FileExistsError):
        wrapped().start(grid, to_arrays(start_of(KIND)), 1)


def test_no_training_is_asked_for(caplog):
    with caplog.at_level(logging.INFO, "flwr"):
        result, strategy = on_flower(KIND, strategy=FedRot(fraction_train=0.0, fraction_evaluate=0.0))
    assert strategy.result is None and result.train_metrics_clientapp == {}
    assert_equal(from_arrays(result.arrays), start_of(KIND))


def test_the_signature_lists_every_option():
    parameters = inspect.signature(FedRot).parameters
    assert {name: parameters[name].default for name in OPTION_NAMES} == FedRot().options.as_dict()
    assert FedRot().options == AggregationOptions(on_invalid="drop")


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ({"group": "O"}, "reflections=True"),
        ({"group": "GL"}, "flexlora"),
        ({"reference": "consensus"}, 'method="fedrot-consensus"'),
        ({"reference": "global"}, "nothing"),
        ({"strength": "auto"}, 'method="fedrot-adaptive"'),
        ({"align_on": "error"}, 'method="fedrot-least-error"'),
    ],
    ids=str,
)
def test_options_of_fedrot_0_1_are_refused_by_their_new_names(option, instead):
    with pytest.raises(ValueError, match=f"fedrot 0.1; write .*{re.escape(instead)}"):
        FedRot(**option)


def test_options_that_make_no_sense_are_refused(tmp_path):
    for options, said in (
        ({"method": "fedrott"}, "fedrott"),
        ({"method": "flora"}, "configs"),
        ({"configs": [configs(KIND)] * 3}, "one peft.LoraConfig"),
        ({"strength": 2}, "strength"),
        ({"resume": True}, "checkpoint"),
        ({"min_train_replies": 0}, "min_train_replies"),
        ({"on_invalid": "ignore"}, "on_invalid"),
        ({"method": "flexlora", "server_optimizer": ServerOptimizer("adam", 0.1)}, "server optimizer"),
        ({"server_optimizer": "momentum"}, "got 'momentum'; pass fedrot.ServerOptimizer"),
        ({"server_optimizer": "none"}, "None for none"),
    ):
        with pytest.raises(ValueError, match=said):
            FedRot(**options)
    wrapped = FedRot(checkpoint=tmp_path, resume=True)
    with pytest.raises(ValueError, match="start"):
        wrapped.configure_train(1, to_arrays(start_of(KIND)), ConfigRecord(), LocalGrid({}))
    on_flower(KIND, rounds=1, strategy=FedRot(method="fedsa-lora", fraction_evaluate=0.0, checkpoint=tmp_path))
    with pytest.raises(FileExistsError, match="resume=True"):
        on_flower(KIND, strategy=FedRot(method="fedsa-lora", fraction_evaluate=0.0, checkpoint=tmp_path))
    with pytest.raises(ValueError, match="cannot resume"):
        on_flower(KIND, strategy=FedRot(method="fedsa-lora", fraction_evaluate=0.0, checkpoint=tmp_path, resume=True))
