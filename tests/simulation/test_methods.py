"""Every method in the simulator: what clients train, start from and keep, and that runs resume to the bit."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import fedrot.simulation.run as run_module
from fedrot import METHODS, read_adapter
from fedrot.simulation import SimulationConfig, simulate
from fedrot.simulation.clients import Clients
from fedrot.simulation.server import Server

QUICK = {"rounds": 4, "local_steps": 3, "clients": 4, "batch_size": 4}
# What resumes as flexlora and fedex-lora do: the state is the adapter, and the base where that is changed.
ALIKE = ("glora", "fedmomentum", "flora-na")
METHOD_RUNS = [
    *({"method": name} for name in METHODS if name not in ALIKE),
    {"server_optimizer": "momentum"},
    {"server_optimizer": "adam"},
]
CPU = torch.device("cpu")


def run(task, folder, resume=False, **options):
    return simulate(SimulationConfig(**QUICK | options), folder, task=task, progress=False, resume=resume)


def files(folder):
    kinds = (".jsonl", ".safetensors", ".csv")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in kinds}


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("options", METHOD_RUNS, ids=lambda o: "-".join(o.values()))
def test_an_interrupted_run_of_every_method_resumes_to_the_bit(task, tmp_path, monkeypatch, options):
    options |= {"clients_per_round": 3}  # so that some clients wait with what is their own
    whole = run(task, tmp_path / "whole", **options)
    save, saved = run_module.save_checkpoint, []

    def cut_after_the_second(folder, tensors, rounds_done):
        save(folder, tensors, rounds_done)
        saved.append(rounds_done)
        if rounds_done == 2:
            raise PowerCut

    monkeypatch.setattr(run_module, "save_checkpoint", cut_after_the_second)
    with pytest.raises(PowerCut):
        run(task, tmp_path / "cut", **options)
    monkeypatch.undo()
    assert saved == [1, 2]
    again = run(task, tmp_path / "cut", resume=True, **options)
    assert again.metrics == whole.metrics
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(task, tmp_path, method):
    before = task.evaluate(task.base_model, 400, CPU)["accuracy"]
    strong = {"local_steps": 15, "batch_size": 16, "eval_every": 4, "dirichlet_alpha": 5}
    last = run(task, tmp_path / "run", method=method, **strong).metrics[-1]
    assert last["accuracy"] > before + (0.1 if METHODS[method].paper.startswith("arXiv") else 0.0)
    # Exact methods lose nothing, the others do.
    exact = METHODS[method].exact.startswith("yes")
    assert (last["relative_error"] < 1e-5) == exact, last["relative_error"]


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_the_final_adapter_belongs_on_the_folded_model(task, tmp_path, method):
    result = run(task, tmp_path / "run", method=method)
    base = AutoModelForImageClassification.from_pretrained(result.folder / "folded_model")
    measured = task.evaluate(PeftModel.from_pretrained(base, result.folder / "adapter"), 400, CPU)
    assert measured == pytest.approx({k: result.metrics[-1][k] for k in measured}, rel=1e-6)
    unfolded = AutoModelForImageClassification.from_pretrained(result.folder / "base_model")
    assert task.evaluate(PeftModel.from_pretrained(unfolded, result.folder / "adapter"), 400, CPU) != measured


def test_the_folded_global_model_is_the_mean_of_the_clients(task):
    """With FLoRA every linear layer's weight after the round is the clients' merged weights' mean."""
    config = SimulationConfig(**QUICK, method="flora")
    clients = Clients(task, config)
    server = Server(clients, config)
    chosen = clients.sample(0)
    states = [s for s, _ in clients.train(0, chosen, [server.start_of(c) for c in chosen], lambda n: None)]
    name = next(n.removesuffix(".lora_A.default.weight") for n in states[0] if n.endswith("q_proj.lora_A.default.weight"))
    layer = clients.model.get_submodule(name)
    before = layer.base_layer.weight.detach().double().clone()
    server.aggregate(chosen, states)
    sizes = torch.tensor([float(len(clients.examples[c])) for c in chosen], dtype=torch.float64)
    updates = [
        layer.scaling["default"] * s[f"{name}.lora_B.default.weight"].double() @ s[f"{name}.lora_A.default.weight"].double()
        for s in states
    ]
    expected = before + sum(w * u for w, u in zip(sizes / sizes.sum(), updates, strict=True))
    torch.testing.assert_close(layer.base_layer.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert server.state[f"{name}.lora_B.default.weight"].abs().max() == 0


@pytest.mark.parametrize(("method", "moved"), [("ffa-lora", ["B", "B"]), ("fedsvd", ["B", "B"]), ("rolora", ["B", "A"])])
def test_only_what_the_method_trains_moves(task, method, moved):
    lora = {"r": 4, "lora_alpha": 8, "modules_to_save": ["classifier"]}
    config = SimulationConfig(**QUICK, method=method, lora=lora)
    clients = Clients(task, config)
    server = Server(clients, config)
    for round, factor in enumerate(moved):
        starts = [server.start_of(c) for c in range(4)]
        states = [s for s, _ in clients.train(round, [0, 1, 2, 3], starts, lambda n: None, server.trained())]
        assert len(states) == 4
        for state, start in zip(states, starts, strict=True):
            changed = {name for name, x in state.items() if not torch.equal(x, start[name])}
            assert {n.split("lora_")[1][0] for n in changed if "lora_" in n} == {factor}
            assert any("lora_" not in n for n in changed)  # heads train every round
        server.aggregate([0, 1, 2, 3], states)


@pytest.mark.parametrize("start", ["shared", "independent"])
def test_with_fedsa_every_client_goes_on_with_its_own_B(task, tmp_path, start):
    config = SimulationConfig(**QUICK, method="fedsa-lora", start=start)
    clients = Clients(task, config)
    server = Server(clients, config)
    states = [s for s, _ in clients.train(0, [0, 2], [server.start_of(c) for c in (0, 2)], lambda n: None)]
    server.aggregate([0, 2], states)
    assert any("lora_B" in name for name in server.start_of(0)) and set(server.state) < set(server.start_of(0))
    for client in range(4):
        initial = clients.state() if start == "shared" else clients.own_start(client)
        own = states[[0, 2].index(client)] if client in (0, 2) else initial
        for name, x in server.start_of(client).items():
            assert torch.equal(x, own[name] if "lora_B" in name else server.state[name]), name

    result = run(task, tmp_path / "run", method="fedsa-lora", start=start)
    adapters = [read_adapter(result.folder / f"adapters/client{c}")[0] for c in range(4)]
    shared = [all(torch.equal(a[key], adapters[0][key]) for a in adapters) for key in adapters[0]]
    assert shared == ["lora_B" not in key for key in adapters[0]]


def test_personal_adapters_are_each_measured_on_a_share_of_the_test_examples(task):
    config = SimulationConfig(**QUICK, method="fedsa-lora")
    clients = Clients(task, config)
    server = Server(clients, config)
    states = [s for s, _ in clients.train(0, [0, 1, 2, 3], [server.start_of(c) for c in range(4)], lambda n: None)]
    server.aggregate([0, 1, 2, 3], states)
    measured = server.evaluate()["accuracy"]
    whole = [clients.evaluate(server.start_of(c))["accuracy"] for c in range(4)]
    assert len(set(whole)) > 1
    assert abs(measured - sum(whole) / 4) < 0.1  # of 400 examples, 100 each


def test_a_server_optimizer_steps_in_the_run(task, tmp_path):
    plain, adam = run(task, tmp_path / "plain"), run(task, tmp_path / "adam", server_optimizer="adam", server_lr=0.003)
    states = [load_file(r.folder / "checkpoint.safetensors") for r in (plain, adam)]
    assert any(name.startswith("optimizer/exp_avg_sq") for name in states[1])
    assert not any(name.startswith("optimizer/") for name in states[0])
    # Adam moves every entry by at most about its rate a round.
    start = Clients(task, adam.config).state()
    for name, x in start.items():
        assert (states[1][f"state/{name}"] - x).abs().max() < 4 * 0.003 * 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ffa-lora", "start": "independent"}, "ffa-lora .* needs a shared start"),
        ({"method": "rolora", "start": "independent"}, "rolora .* needs a shared start"),
        ({"method": "flora", "server_optimizer": "adam"}, "flora's result .* cannot have a server optimizer"),
        ({"method": "fedex-lora", "dtype": "bfloat16"}, "fedex-lora .* bfloat16 would round away"),
        ({"method": "flexlora", "energy": 0.9}, "energy=0.9 is for clients of unequal ranks"),
        ({"server_lr": 0.0}, "server_lr must be positive"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SimulationConfig(**options)


@pytest.mark.drawn
def test_every_client_reports_its_size_and_label_histogram(task, tmp_path):
    result = run(task, tmp_path / "run", rounds=1)
    _, *rows = (result.folder / "partition.csv").read_text().splitlines()
    sizes = [sum(map(int, row.split(",")[-10:])) for row in rows]
    assert len(rows) == 4 and sum(sizes) == len(task.train)
    assert (result.folder / "partition.png").read_bytes().startswith(b"\x89PNG")


def test_the_geometry_is_measured_when_asked_for(task, tmp_path):
    rows = run(task, tmp_path / "run", geometry=True).metrics
    assert all(row["error_bound"] >= row["aggregation_error"] > 0 for row in rows)
    assert all(0 <= row["removed_A"] < 1 for row in rows)
    assert "error_bound" not in run(task, tmp_path / "without").metrics[0]
    personal = run(task, tmp_path / "fedsa", geometry=True, method="fedsa-lora").metrics
    assert all(json.dumps(row) for row in personal)


def test_errors_name_the_client_of_the_federation(task, tmp_path):
    config = SimulationConfig(**QUICK)
    clients = Clients(task, config)
    server = Server(clients, config)
    state = clients.state()
    broken = {name: x * torch.nan for name, x in state.items()}
    with pytest.raises(ValueError, match=r"client 3, .* holds NaN"):
        server.aggregate([1, 3], [state, broken])


def test_what_a_method_cannot_merge_is_refused_before_anything_is_written(task, tmp_path):
    lora = {"r": 4, "lora_alpha": 8, "use_dora": True}
    with pytest.raises(ValueError, match="flora merges"):
        run(task, tmp_path / "run", method="flora", lora=lora)
    assert not (tmp_path / "run").exists()


def test_replacing_a_method_checks_it_again():
    with pytest.raises(ValueError, match="shared start"):
        replace(SimulationConfig(start="independent"), method="rolora")
