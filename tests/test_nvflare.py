"""The aggregator for NVIDIA FLARE: inside a run of its simulator, and answer by answer."""

import logging
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fedrot

from .peft_models import KINDS, turned_clients
from .refusals import HEAD, A, B, refused

pytest.importorskip("nvflare")

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict
from nvflare.client.config import ExchangeFormat
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner

from fedrot.nvflare import FedRotModelAggregator
from fedrot.server.aggregator import towards

SITES, STEPS = ("site-1", "site-2", "site-10"), (3, 1, 2)
# A client whose training adds the change that a file holds for this site and round, and that keeps what it sends.
CLIENT = """
import sys
from pathlib import Path

import nvflare.client as flare
from nvflare.app_common.abstract.fl_model import FLModel
from safetensors.torch import load_file, save_file

folder, steps = Path(sys.argv[1]), {"site-1": 3, "site-2": 1, "site-10": 2}
flare.init()
site = flare.get_site_name()
while flare.is_running():
    received = flare.receive()
    changes = load_file(folder / f"{site}-{received.current_round}.safetensors")
    params = {key: received.params[key] + change for key, change in changes.items()}
    save_file(params, folder / f"{site}-{received.current_round}-sent.safetensors")
    meta = {"NUM_STEPS_CURRENT_ROUND": steps[site]}
    flare.send(FLModel(params=params, metrics={"loss": float(steps[site])}, meta=meta))
"""


def contiguous(state):
    return {key: x.contiguous() for key, x in state.items()}


@pytest.fixture
def start():
    return contiguous(turned_clients(KINDS["modules to save"], 3)[0])


@pytest.fixture
def updates():
    return [contiguous(update) for update in turned_clients(KINDS["modules to save"], 3)[1]]


def send(aggregator, model, round=0):
    """What the controllers do with a round's task."""
    aggregator.reset_stats()
    context = FLContext()
    task = FLModelUtils.to_shareable(FLModel(params=model, current_round=round))
    context.set_prop(AppConstants.TRAIN_SHAREABLE, task, private=True, sticky=False)
    aggregator.handle_event(AppEventType.BEFORE_TRAIN_TASK, context)


def answer(name, params, steps=1, **fields):
    meta = {"client_name": name} | ({} if steps is None else {"NUM_STEPS_CURRENT_ROUND": steps})
    return FLModel(params=params, meta=meta, **fields)


def run_round(aggregator, start, updates, round=0, names=SITES, steps=STEPS, **fields):
    send(aggregator, start, round)
    for name, update, n in zip(names, updates, steps, strict=True):
        aggregator.accept_model(answer(name, update, n, **fields))
    return aggregator.aggregate_model()


def equal(a, b):
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def as_arrays(state):
    return {key: x.numpy() for key, x in state.items()}


def test_simulator(tmp_path, monkeypatch):
    # bfloat16, a server optimizer, and in round 1 a client that sends NaN: FedAvg's loop is FedRotAggregator's, to the bit.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start, turned = turned_clients(KINDS["bfloat16"], 3)
    torch.save(contiguous(start), tmp_path / "start.pt")
    for site, client in zip(SITES, turned, strict=True):
        for round, size in enumerate((1.0, 0.1)):
            changes = {key: (client[key] - x) * size for key, x in start.items()}
            if (site, round) == ("site-2", 1):
                changes[B][0] = torch.nan
            save_file(contiguous(changes), tmp_path / f"{site}-{round}.safetensors")
    (tmp_path / "client.py").write_text(CLIENT)

    def options():
        return {"strength": 1.0, "server_optimizer": fedrot.ServerOptimizer("momentum", 0.5)}

    job = FedJob("fedrot")
    job.set_app_packages(["fedrot"])
    persistor = PTFileModelPersistor(source_ckpt_file_full_name=str(tmp_path / "start.pt"), allow_numpy_conversion=False)
    job.to_server(persistor, id="persistor")
    job.to_server(FedAvg(num_clients=3, num_rounds=2, aggregator=FedRotModelAggregator(**options())))
    script = ScriptRunner(str(tmp_path / "client.py"), str(tmp_path), server_expected_format=ExchangeFormat.PYTORCH)
    for site in SITES:
        job.to(script, site)
    assert job.simulator_run(str(tmp_path / "workspace"), threads=3) == 0

    server = tmp_path / "workspace" / "server"
    saved = torch.load(server / "simulate_job" / "app_server" / "FL_global_model.pt")
    by_hand = fedrot.FedRotAggregator(contiguous(start), on_invalid="drop", **options())
    for round in range(2):
        sent = [load_file(tmp_path / f"{site}-{round}-sent.safetensors") for site in SITES]
        result = by_hand.aggregate(sent, STEPS, names=SITES)
    assert equal(dict(saved["model"]), result.state_dict)
    assert saved["meta_props"]["nr_aggregated"] == 2
    log = (server / "log.txt").read_text()
    assert f"round 1: dropped site-2: site-2, {B} (16, 4) holds NaN or Inf" in log
    report = result.report
    assert f"round 1: loss 2.6, aggregation_error {report.error:.4g}, relative_error {report.relative_error:.4g}, " in log
    assert f"rotation_angle {report.angle:.4g}, clients 2, dropped 1" in log


@pytest.mark.parametrize("options", [{"strength": 1.0}, {"reference": "consensus", "strength": "auto"}], ids=str)
@pytest.mark.parametrize("convert", [dict, as_arrays])
def test_rounds(start, updates, convert, options):
    of_start = towards(options.get("reference", "global"), start)
    aggregator = FedRotModelAggregator(**options)
    by_hand = fedrot.FedRotAggregator(**{**options, **of_start}, round=3)
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
    "another round": (dict, {"current_round": 1}, ("round 1", "round 2")),
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
    assert f"round 2: dropped site-2: {why}" in caplog.text


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
    with refused("round 0", "1 good answers", "site-2 sent no NUM_STEPS_CURRENT_ROUND"):
        aggregator.aggregate_model()


def test_no_good_answer_is_left(start, updates):
    aggregator = FedRotModelAggregator()
    send(aggregator, start)
    for name in SITES[:2]:
        with refused(name):
            aggregator.accept_model(answer(name, {}))
    with refused("0 good answers", *SITES[:2]):
        aggregator.aggregate_model()


@pytest.mark.parametrize(("method", "round", "frozen"), [("ffa-lora", 1, "A"), ("rolora", 0, "A"), ("rolora", 1, "B")])
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
    for method in ("flora", "fedex-lora", "fedsa-lora"):
        with refused(method, "whole adapters", error=ValueError):
            FedRotModelAggregator(method=method)
    with refused("on_invalid", "ignore", error=ValueError):
        FedRotModelAggregator(on_invalid="ignore")


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
