"""The strategy against the aggregator that it stands for, over real messages and ClientApps."""

import inspect
import logging
import re

import pytest
from flwr.app import ArrayRecord, ConfigRecord

from fedrot import METHODS, FedRotAggregator, ServerOptimizer
from fedrot.adapters.keys import factor_of
from fedrot.flower import FedRot, from_arrays, to_arrays
from fedrot.options import OPTION_NAMES, AggregationOptions

from ..peft_models import KINDS
from .local_grid import LocalGrid, client_app, fresh_model
from .strategy_runs import CLIENTS, KIND, ROUNDS, WEIGHTS, assert_equal, configs, in_process, on_flower, options_of, start_of


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
        ({"method": "flexlora", "energy": 0.9}, "energy=0.9 is for clients of unequal ranks"),
        ({"method": "flexlora", "server_rank": 3}, "server_rank=3 is for clients of unequal ranks"),
        ({"method": "flexlora", "collapse": "raflora"}, "collapse='raflora' is for clients of unequal ranks"),
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
