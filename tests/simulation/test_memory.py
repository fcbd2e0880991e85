"""As many clients share a pass as the memory that is free has room for."""

import psutil
import pytest
import torch
from torch import nn

from fedrot.simulation import SimulationConfig
from fedrot.simulation.clients import Clients
from fedrot.simulation.training import memory
from fedrot.simulation.training.memory import MARGIN, clients_that_fit, free_memory, pass_memory

CPU = torch.device("cpu")
SMALL = {"clients": 4, "local_steps": 2, "batch_size": 4, "lora": {"r": 2, "lora_dropout": 0.1}}


def test_what_is_saved_for_the_backward_pass_counts_once_and_the_model_does_not():
    model = nn.Sequential(nn.Linear(100, 50, bias=False), nn.Tanh(), nn.Tanh(), nn.Linear(50, 7, bias=False))
    x = torch.randn(30, 100)
    with pass_memory(model, CPU) as found:
        model(x).sum().backward()
    # The input; the output of either Tanh, of which the second is saved by the last layer too.
    assert found == [4 * (30 * 100 + 2 * 30 * 50)]


def test_a_frozen_model_saves_nothing():
    model = nn.Sequential(nn.Linear(100, 50), nn.Tanh()).requires_grad_(False)
    with pass_memory(model, CPU) as found:
        model(torch.randn(30, 100))
    assert found == [0]


def test_free_memory_is_that_of_the_system():
    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total


@pytest.mark.parametrize(("needed", "clients"), [(1, 60), (10, 6), (11, 5), (59, 1), (1000, 1)])
def test_a_margin_is_left(monkeypatch, needed, clients):
    monkeypatch.setattr(memory, "free_memory", lambda device: 100)
    assert MARGIN == 0.6
    assert clients_that_fit(needed, CPU) == clients


def train(task, monkeypatch, per_pass, free=None):
    clients = Clients(task, SimulationConfig(**SMALL, clients_per_pass=per_pass))
    if free is not None:
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
    passes = []
    chosen = [0, 1, 2, 3]
    results = clients.train(0, chosen, [clients.state()] * len(chosen), passes.append)
    return passes, results


def test_passes_are_as_large_as_memory_allows_and_train_the_same(task, monkeypatch):
    steps = SMALL["local_steps"]
    everyone, expected = train(task, monkeypatch, None)
    assert everyone == [4] * steps
    assert train(task, monkeypatch, "auto")[0] == [4] * steps
    needed = []
    monkeypatch.setattr("fedrot.simulation.clients.clients_that_fit", lambda size, device: needed.append(size) or 4)
    train(task, monkeypatch, "auto")
    monkeypatch.undo()
    passes, trained = train(task, monkeypatch, "auto", free=int(3 * needed[0] / MARGIN) + 1)
    assert passes == [3] * steps + [1] * steps
    assert train(task, monkeypatch, "auto", free=0)[0] == [1] * 4 * steps
    for (together, loss), (apart, loss_apart) in zip(expected, trained, strict=True):
        assert loss == pytest.approx(loss_apart, rel=1e-5)
        for name, value in together.items():
            torch.testing.assert_close(apart[name], value, rtol=1e-3, atol=1e-5)


def test_a_client_that_needs_twice_the_memory_is_seen_to(task, monkeypatch):
    needed = []
    monkeypatch.setattr("fedrot.simulation.clients.clients_that_fit", lambda size, device: needed.append(size) or 1)
    for batch_size in (4, 16):
        clients = Clients(task, SimulationConfig(**{**SMALL, "batch_size": batch_size}, clients_per_pass="auto"))
        clients.train(0, [0], [clients.state()], lambda n: None)
    copies = 5 * sum(p.nbytes for p in clients.parameters.values())
    assert needed[1] - copies > 3 * (needed[0] - copies) > 0


def test_no_number_of_clients_below_one_is_taken():
    with pytest.raises(ValueError, match="clients_per_pass must be at least 1, auto or left out, got 0"):
        SimulationConfig(clients_per_pass=0)
