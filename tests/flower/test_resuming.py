"""Runs of the strategy that go on from a checkpoint, and what is no checkpoint of theirs."""

import json
import logging

import pytest
import torch
from flwr.app import MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping

from fedrot import METHODS, ServerOptimizer, UpdateError
from fedrot.adapters.keys import factor_of
from fedrot.flower import FedRot, from_arrays, to_arrays
from fedrot.server.checkpoint import save_checkpoint

from .local_grid import LocalGrid, client_app
from .strategy_runs import CLIENTS, KIND, assert_equal, on_flower, options_of, start_of


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
