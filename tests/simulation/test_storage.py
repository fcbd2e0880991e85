"""Weights that are stored in float16: every value is representable, small updates are lost, large ones are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import fedrot.simulation.run as run_module
from fedrot.adapters.keys import factor_of
from fedrot.errors import UpdateError
from fedrot.simulation import SimulationConfig, load_task, simulate
from fedrot.simulation.clients import Clients
from fedrot.simulation.server import Server

QUICK = {"rounds": 3, "local_steps": 3, "clients": 4, "batch_size": 4, "dtype": "float16", "optimizer": "sgd", "lr": 0.05}
LORA = {"r": 4, "lora_alpha": 8, "modules_to_save": ["classifier"]}  # a trained head too


@pytest.fixture(scope="module")
def half_task():
    return load_task(SimulationConfig(dtype="float16"))


def representable(tensors):
    return bool(tensors) and all(torch.equal(x, x.half().to(x.dtype)) for x in tensors.values())


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".jsonl", ".safetensors")}


def by_factor(state, factor):
    found = {name: x for name, x in state.items() if factor_of(name) == factor}
    assert found
    return found


def trained(task, start=None, **options):
    clients = Clients(task, SimulationConfig(**QUICK | {"lora": LORA} | options))
    start = start or clients.state()
    return start, clients.train(0, [0], [start], lambda n: None)[0][0]


def test_updates_below_half_a_unit_in_the_last_place_are_lost(half_task):
    # B moves from 0 at once. A's gradient has B as a factor, so that A, of size 0.1, would move by some 1e-10.
    start, state = trained(half_task, lr=1e-5)
    _, wide = trained(half_task, start, lr=1e-5, dtype="float32")
    assert all(torch.equal(x, start[name]) for name, x in by_factor(state, "A").items())
    for moved in (by_factor(state, "B"), by_factor(wide, "B"), by_factor(wide, "A")):
        assert any(not torch.equal(x, start[name]) for name, x in moved.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_is_that_of_float32_rounded_to_nearest(half_task, optimizer):
    options = {"local_steps": 1, "lr": 0.1, "optimizer": optimizer}
    start, state = trained(half_task, **options)
    _, wide = trained(half_task, start, dtype="float32", **options)
    assert representable(start) and not representable(wide)
    assert all(torch.equal(x, wide[name].half().float()) for name, x in state.items())


def test_training_starts_from_rounded_values_whatever_it_is_given(half_task):
    start, state = trained(half_task)
    _, again = trained(half_task, {name: x * (1 + 1e-5) for name, x in start.items()})
    assert all(torch.equal(x, state[name]) for name, x in again.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start": "independent"},
        {"method": "rolora"},
        {"method": "fedsa-lora", "start": "independent"},
        {"server_optimizer": "adam"},
    ],
    ids=str,
)
def test_everything_that_is_kept_is_representable(half_task, tmp_path, options):
    config = SimulationConfig(**QUICK | {"lora": LORA} | options)
    clients = Clients(half_task, config)
    server = Server(clients, config)
    assert representable(dict(clients.model.named_parameters()))
    for round in range(3):
        starts = [server.start_of(c) for c in range(4)]
        states = [s for s, _ in clients.train(round, [0, 1, 2, 3], starts, lambda n: None, server.trained())]
        assert all(map(representable, [*starts, *states]))
        server.aggregate([0, 1, 2, 3], states)
        server.evaluate()
        assert representable(dict(clients.model.named_parameters())) and representable(server.state)
    result = simulate(config, tmp_path / "run", task=half_task, progress=False)
    (*_, saved) = sorted(result.folder.rglob("adapter_model.safetensors"))
    assert representable(load_file(saved)) and representable(load_file(result.folder / "base_model/model.safetensors"))


def test_the_base_of_a_pretrained_model_is_rounded_too(tiny_bert, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "a good film,1\na bad film,0\n" * 20)
    options = {"model": str(tiny_bert), "dataset": str(tmp_path / "train.csv"), "lora": {"target_modules": ["query"]}}
    whole = load_task(SimulationConfig(**options)).base_model.state_dict()
    half = load_task(SimulationConfig(**options, dtype="float16")).base_model.state_dict()
    assert representable(half) and not representable(whole)
    assert all(torch.equal(x.half().float() if x.is_floating_point() else x, half[name]) for name, x in whole.items())


def test_an_interrupted_run_resumes_to_the_bit(half_task, tmp_path, monkeypatch):
    config = SimulationConfig(**QUICK, lora=LORA)
    whole = simulate(config, tmp_path / "whole", task=half_task, progress=False)
    save = run_module.save_checkpoint

    def cut_after_the_first(folder, tensors, rounds_done):
        save(folder, tensors, rounds_done)
        raise InterruptedError

    monkeypatch.setattr(run_module, "save_checkpoint", cut_after_the_first)
    with pytest.raises(InterruptedError):
        simulate(config, tmp_path / "cut", task=half_task, progress=False)
    monkeypatch.undo()
    again = simulate(config, tmp_path / "cut", progress=False, resume=True)  # with the base model that was saved
    assert again.metrics == whole.metrics and len(again.metrics) == 3
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_overflows_is_refused_as_infinite(half_task, tmp_path):
    config = SimulationConfig(**QUICK | {"lr": 1e9, "local_steps": 1})
    with pytest.raises(UpdateError, match=r"client \d, .*lora_B.*(NaN|Inf)"):
        simulate(config, tmp_path / "run", task=half_task, progress=False)


def test_it_is_another_run_than_one_in_float32(task, half_task, tmp_path):
    half = simulate(SimulationConfig(**QUICK), tmp_path / "half", task=half_task, progress=False)
    whole = simulate(SimulationConfig(**QUICK | {"dtype": "float32"}), tmp_path / "whole", task=task, progress=False)
    losses = [[json.loads(line)["loss"] for line in (r.folder / "metrics.jsonl").open()] for r in (half, whole)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_methods_that_change_the_base_are_refused(method):
    with pytest.raises(ValueError, match=f"{method} adds to the base weights what float16 would round away"):
        SimulationConfig(method=method, dtype="float16")
