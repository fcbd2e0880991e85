"""The aggregator for NVIDIA FLARE, answer by answer."""

import inspect
import logging
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict
from safetensors.torch import save_file

import fedrot
from fedrot.nvflare import FedRotModelAggregator
from fedrot.options import OPTION_NAMES, AggregationOptions

from ..peft_models import KINDS, turned_clients
from ..refusals import HEAD, A, B, refused
from .rounds import SITES, STEPS, answer, as_arrays, equal, run_round, send


@pytest.mark.parametrize(
    "options", [{"strength": 1.0}, {"method": "fedrot-consensus"}, {"method": "fedrot-adaptive"}], ids=str
)
@pytest.mark.parametrize("convert", [dict, as_arrays])
def test_rounds(start, updates, convert, options):
    aggregator = FedRotModelAggregator(**options)
    by_hand = fedrot.FedRotAggregator(start, round=3, **options)
    model = convert(start)
    for round in (3, 4):  # aligned on A, then on B
        out = run_round(aggregator, model, [convert(u) for u in updates], round)
        expected = by_hand.aggregate(updates, STEPS)
        model = out.params
        assert {type(x) for x in model.values()} == {type(x) for x in convert(start).values()}
        assert equal({key: torch.as_tensor(x) for key, x in model.items()}, expected.state_dict)
        assert (out.params_type, out.current_round) == (ParamsType.FULL, round)
        assert out.metrics == {
            "aggregation_error": expected.report.error,
            "relative_error": expected.report.relative_error,
            "plain_relative_error": expected.report.plain_relative_error,
            "rotation_angle": expected.report.angle,
            "clients": 3,
            "dropped": 0,
        }


def test_the_reference_is_what_was_sent(start, updates):
    aggregator = FedRotModelAggregator(strength=1.0)
    run_round(aggregator, start, updates)
    other = turned_clients(KINDS["modules to save"], 1, seed=5)[0]
    out = run_round(aggregator, other, updates, 1)
    assert equal(out.params, fedrot.aggregate(updates, STEPS, other, round=1, strength=1.0).state_dict)


def test_any_order_of_arrival(start, updates):
    aggregator, results = FedRotModelAggregator(), []
    for order in permutations(range(3)):
        names, steps = [SITES[i] for i in order], [STEPS[i] for i in order]
        results.append(run_round(aggregator, start, [updates[i] for i in order], names=names, steps=steps))
        assert aggregator.result.report.clients == SITES
    assert all(equal(out.params, results[0].params) and out.metrics == results[0].metrics for out in results)
    for names in (("site-1", "site-01", "site-2"), ("site-01", "site-1", "site-2")):
        run_round(aggregator, start, updates, names=names)
        assert aggregator.result.report.clients == ("site-01", "site-1", "site-2")


def test_changes_instead_of_values(start, updates):
    # As NVFlare makes them with TransferType.DIFF: the sums are the values again, to rounding.
    changes = [{key: u[key] - x for key, x in start.items()} for u in updates]
    out = run_round(FedRotModelAggregator(), start, changes, params_type=ParamsType.DIFF)
    full = run_round(FedRotModelAggregator(), start, updates)
    assert out.params_type == ParamsType.FULL
    torch.testing.assert_close(out.params, full.params, rtol=1e-5, atol=1e-6)


def test_keys_are_the_servers(start, updates):
    in_model = {key.replace(".weight", ".default.weight") if "lora_" in key else key: x for key, x in start.items()}
    out = run_round(FedRotModelAggregator(), in_model, updates)
    assert equal(out.params, dict(zip(in_model, fedrot.aggregate(updates, STEPS, start).state_dict.values(), strict=True)))


def test_tensors_left_on_disk(start, updates, tmp_path):
    save_file(updates[0], tmp_path / "a.safetensors")
    lazy = LazyTensorDict({key: (str(tmp_path / "a.safetensors"), key) for key in updates[0]}, str(tmp_path))
    first = {key: lazy.make_lazy_ref(key) for key in updates[0]}
    out = run_round(FedRotModelAggregator(), start, [first, *updates[1:]])
    assert equal(out.params, run_round(FedRotModelAggregator(), start, updates).params)


def test_weights(start, updates):
    alike = run_round(FedRotModelAggregator(weighted_by=None), start, updates, steps=(None, 5, "many"))
    assert equal(alike.params, fedrot.aggregate(updates, None, start).state_dict)
    aggregator = FedRotModelAggregator(weighted_by="examples")
    send(aggregator, start)
    for name, update, n in zip(SITES, updates, STEPS, strict=True):
        aggregator.accept_model(FLModel(params=update, meta={"client_name": name, "examples": n}))
    assert equal(aggregator.aggregate_model().params, fedrot.aggregate(updates, STEPS, start).state_dict)


def test_metrics_of_the_clients(start, updates):
    aggregator = FedRotModelAggregator(report_error=False)
    send(aggregator, start)
    sent = [
        {"loss": 1.0, "accuracy": 1, "some": 1.0, "broken": 1.0, "text": "a"},
        {"loss": 2.0, "accuracy": 0, "broken": float("nan"), "text": "b"},
        {"accuracy": 1, "loss": 4.0, "some": 1.0, "broken": 1.0, "text": "c"},
    ]
    for name, update, n, metrics in zip(SITES, updates, STEPS, sent, strict=True):
        aggregator.accept_model(answer(name, update, n, metrics=metrics))
    metrics = aggregator.aggregate_model().metrics
    assert list(metrics) == ["loss", "accuracy", "rotation_angle", "clients", "dropped"]
    assert (metrics["loss"], metrics["accuracy"]) == ((3 + 2 + 8) / 6, 5 / 6)


def without(key):
    return lambda update: {k: x for k, x in update.items() if k != key}


def put(key, change):
    return lambda update: update | {key: change(update[key])}


WRONG = {
    "lacks a factor": (without(B), {}, (f"lacks {B}",)),
    "lacks a head": (without(HEAD), {}, (f"lacks {HEAD}", "the server's model")),
    "extra key": (lambda u: u | {"other": torch.zeros(2)}, {}, ("has other",)),
    "shape": (put(HEAD, lambda x: x[:2]), {}, (HEAD, "(2, 16)", "(3, 16)")),
    "rank": (lambda u: u | {A: u[A][:2], B: u[B][:, :2]}, {}, (A, "(2, 16)", "(4, 16)")),
    "dtype": (put(HEAD, torch.Tensor.half), {}, (HEAD, "torch.float16", "torch.float32")),
    "integers": (put(HEAD, torch.Tensor.int), {}, (HEAD, "torch.int32")),
    "NaN": (put(HEAD, lambda x: x * torch.nan), {}, (HEAD, "holds NaN or Inf")),
    "diverged": (put(A, lambda x: x * 1e30), {}, (A, "(4, 16)", "diverge")),
    "a list": (put(A, torch.Tensor.tolist), {}, (A, "list")),
    "objects": (put(A, lambda x: np.array([None, x], dtype=object)), {}, ("numpy.object_",)),
    "no mapping": (lambda u: list(u.values()), {}, ("list",)),
    "no weight": (dict, {"steps": None}, ("NUM_STEPS_CURRENT_ROUND", "FLModel.meta")),
    "negative weight": (dict, {"steps": -1}, ("weight -1",)),
    "weight NaN": (dict, {"steps": float("nan")}, ("weight nan",)),
    "text for a weight": (dict, {"steps": "many"}, ("weight many",)),
    "another round": (dict, {"current_round": 1}, ("current_round 1", "this is round 3 (current_round 2)")),
    "a change of another shape": (put(HEAD, lambda x: x[:1]), {"params_type": ParamsType.DIFF}, (HEAD, "(1, 16)")),
}


@pytest.mark.parametrize(("change", "fields", "named"), WRONG.values(), ids=list(WRONG))
def test_wrong_answers_are_dropped(start, updates, change, fields, named, caplog):
    aggregator = FedRotModelAggregator()
    send(aggregator, start, 2)
    aggregator.accept_model(answer("site-1", updates[0]))
    with refused("site-2", *named):
        aggregator.accept_model(answer("site-2", change(updates[1]), **fields))
    aggregator.accept_model(answer("site-10", updates[2], current_round=2))
    with caplog.at_level(logging.WARNING):
        out = aggregator.aggregate_model()
    assert equal(out.params, fedrot.aggregate([updates[0], updates[2]], None, start, round=2).state_dict)
    assert (out.metrics["clients"], out.metrics["dropped"]) == (2, 1)
    why = aggregator.result.report.dropped["site-2"]
    assert f"round 3 (current_round 2): dropped site-2: {why}" in caplog.text


def test_the_second_answer_of_a_client_is_dropped(start, updates):
    aggregator = FedRotModelAggregator()
    send(aggregator, start)
    aggregator.accept_model(answer("site-1", updates[0]))
    with refused("site-1 answered a second time"):
        aggregator.accept_model(answer("site-1", updates[1]))
    assert equal(aggregator.aggregate_model().params, fedrot.aggregate(updates[:1], None, start).state_dict)


def test_raise_on_wrong_answers(start, updates):
    aggregator = FedRotModelAggregator(on_invalid="raise")
    send(aggregator, start)
    aggregator.accept_model(answer("site-1", updates[0]))
    with refused("site-2"):
        aggregator.accept_model(answer("site-2", updates[1], None))
    with refused("round 1 (current_round 0): 1 good answers", "site-2 sent no NUM_STEPS_CURRENT_ROUND"):
        aggregator.aggregate_model()


def test_no_good_answer_is_left(start, updates):
    aggregator = FedRotModelAggregator()
    send(aggregator, start)
    for name in SITES[:2]:
        with refused(name):
            aggregator.accept_model(answer(name, {}))
    with refused("0 good answers", *SITES[:2]):
        aggregator.aggregate_model()


def test_answers_without_steps_are_named(start, updates):
    with refused("round 3 (current_round 2)", "NUM_STEPS_CURRENT_ROUND is 0", ", ".join(SITES)):
        run_round(FedRotModelAggregator(), start, updates, 2, steps=(0, 0, 0))


@pytest.mark.parametrize(
    ("method", "round", "frozen"), [("ffa-lora", 1, "A"), ("fedsvd", 1, "A"), ("rolora", 0, "A"), ("rolora", 1, "B")]
)
def test_frozen_factors_must_be_what_was_sent(start, updates, method, round, frozen):
    aggregator = FedRotModelAggregator(method=method)
    alike = [u | {key: x for key, x in start.items() if f"lora_{frozen}" in key} for u in updates]
    expected = fedrot.aggregate(alike, STEPS, start, method=method, round=round).state_dict
    assert equal(run_round(aggregator, start, alike, round).params, expected)
    send(aggregator, start, round)
    with refused("site-1", {"A": A, "B": B}[frozen], "frozen"):
        aggregator.accept_model(answer("site-1", updates[0]))


def test_ranks_are_the_servers(start, updates):
    # Of any method: NVFlare tells the server nothing of a client's scaling.
    aggregator = FedRotModelAggregator(method="flexlora")
    send(aggregator, start)
    with refused("site-1", A, "(2, 16)", "(4, 16)"):
        aggregator.accept_model(answer("site-1", updates[0] | {A: updates[0][A][:2], B: updates[0][B][:, :2]}))
    expected = fedrot.aggregate(updates, STEPS, start, method="flexlora").state_dict
    assert equal(run_round(aggregator, start, updates).params, expected)


def test_reset_forgets_the_round(start, updates):
    aggregator = FedRotModelAggregator()
    send(aggregator, start)
    aggregator.accept_model(answer("site-1", updates[0]))
    with refused("site-2"):
        aggregator.accept_model(answer("site-2", {}))
    out = run_round(aggregator, start, updates[1:], 1, SITES[1:], STEPS[1:])  # resets, as the controllers do
    assert equal(out.params, fedrot.aggregate(updates[1:], STEPS[1:], start, round=1).state_dict)
    assert out.metrics["dropped"] == 0
    with refused("no model was sent"):  # aggregating has reset it
        aggregator.accept_model(answer("site-1", updates[0]))


def test_a_task_without_its_round(start, updates):
    aggregator = FedRotModelAggregator()
    send(aggregator, start, None)
    with refused("current_round"):
        aggregator.accept_model(answer("site-1", updates[0]))


def test_scatter_and_gather(start, updates):
    # It passes the client's name beside the message, and takes no exceptions.
    aggregator = FedRotModelAggregator()
    send(aggregator, start)
    accepted = []
    shareables = [FLModelUtils.to_shareable(answer("forged", u, n)) for u, n in zip(updates, STEPS, strict=True)]
    shareables[1] = DXO(DataKind.WEIGHTS, data={"x": np.zeros(2)}).to_shareable()
    for name, shareable in zip(
        (*SITES, "site-11"), [*shareables, FLModelUtils.to_shareable(answer("", start))], strict=True
    ):
        if name == "site-11":
            shareable.pop("DXO")
        shareable.set_peer_props({ReservedKey.IDENTITY_NAME: name})
        accepted.append(aggregator.accept(shareable, FLContext()))
    assert accepted == [True, False, True, False]
    out = FLModelUtils.from_shareable(aggregator.aggregate(FLContext()))
    assert equal(out.params, fedrot.aggregate(updates[::2], STEPS[::2], start).state_dict)
    assert aggregator.result.report.clients == ("site-1", "site-10")
    assert list(aggregator.result.report.dropped) == ["site-2", "site-11"]


def test_options():
    for method in ("flora", "fedex-lora", "fedmomentum", "fedsa-lora"):
        with refused(method, "whole adapters", error=ValueError):
            FedRotModelAggregator(method=method)
    with refused("on_invalid", "ignore", error=ValueError):
        FedRotModelAggregator(on_invalid="ignore")
    with refused("flexlora", "server optimizer", error=ValueError):
        FedRotModelAggregator(fedrot.ServerOptimizer("adam", 0.1), method="flexlora")
    for name, value in (("energy", 0.9), ("server_rank", 3), ("collapse", "raflora")):
        with refused(f"{name}={value!r}", "unequal ranks", error=ValueError):
            FedRotModelAggregator(method="flexlora", **{name: value})
    for name in ("momentum", "none"):
        with refused(f"got {name!r}", "pass fedrot.ServerOptimizer", "None for none", error=ValueError):
            FedRotModelAggregator(server_optimizer=name)
    with refused("fedrot 0.1", "reflections=True", error=ValueError):
        FedRotModelAggregator(group="O")
    with refused("fedrot 0.1", "fedrot-consensus", error=ValueError):
        FedRotModelAggregator(reference="consensus")


def test_the_signature_lists_every_option():
    parameters = inspect.signature(FedRotModelAggregator.__init__).parameters
    assert list(parameters) == ["self", "server_optimizer", "weighted_by", "configs", *OPTION_NAMES]
    defaults = {name: parameters[name].default for name in OPTION_NAMES}
    assert defaults == AggregationOptions(on_invalid="drop").as_dict()


def test_optional():
    # fedrot does not need NVFlare, and its module for it says what does.
    code = """
import sys
import fedrot
assert "nvflare" not in sys.modules
sys.modules["nvflare"] = None
import fedrot.nvflare
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError: fedrot.nvflare needs NVIDIA FLARE: pip install 'fedrot[nvflare]'" in run.stderr
