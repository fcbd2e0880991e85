"""The simulator's server: how it weighs clients, and the norms of the adapter that it gives back."""

import numpy as np
import pytest
import torch

from fedrot.adapters.keys import factor_of
from fedrot.simulation import SimulationConfig, simulate
from fedrot.simulation.clients import Clients
from fedrot.simulation.server import Server

QUICK = {"rounds": 2, "local_steps": 3, "clients": 4, "batch_size": 4}


def one_round(task, **options):
    config = SimulationConfig(**QUICK | options)
    clients = Clients(task, config)
    server = Server(clients, config)
    states = [s for s, _ in clients.train(0, [0, 1, 3], [server.start_of(c) for c in (0, 1, 3)], lambda n: None)]
    result, _ = server.aggregate([0, 1, 3], states)
    return clients, states, server, result


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_clients_are_weighed_by_their_examples_or_equally(task, weights):
    clients, states, server, result = one_round(task, method="fedit", client_weights=weights)
    sizes = np.array([len(clients.examples[c]) for c in (0, 1, 3)])
    assert len(set(sizes)) == 3, "clients of one size could not tell the two apart"
    shares = sizes / sizes.sum() if weights == "examples" else np.ones(3) / 3
    assert list(result.report.weights) == pytest.approx(shares)
    for name, x in server.state.items():
        mean = sum(w * s[name].double() for w, s in zip(shares, states, strict=True))
        torch.testing.assert_close(x.double(), mean, rtol=1e-5, atol=1e-7)


def test_clients_are_weighed_by_their_examples_unless_told_otherwise():
    assert SimulationConfig().client_weights == "examples"
    with pytest.raises(ValueError, match="client_weights must be one of examples, equal, got 'samples'"):
        SimulationConfig(client_weights="samples")


@pytest.mark.parametrize("method", ["fedrot", "fedsa-lora"])
def test_every_round_has_the_norms_of_the_global_adapter(task, tmp_path, method):
    result = simulate(SimulationConfig(**QUICK, method=method), tmp_path / "run", task=task, progress=False)
    config = SimulationConfig(**QUICK, method=method)
    clients = Clients(task, config)
    server = Server(clients, config)
    shared = "A" if method == "fedsa-lora" else "AB"
    assert len(result.metrics) == 2
    for round, row in enumerate(result.metrics):
        starts = [server.start_of(c) for c in range(4)]
        server.aggregate([0, 1, 2, 3], [s for s, _ in clients.train(round, [0, 1, 2, 3], starts, lambda n: None)])
        for factor in "AB":
            values = [x.double().numpy().ravel() for name, x in server.state.items() if factor_of(name) == factor]
            if factor in shared:
                assert row[f"norm_{factor}"] == pytest.approx(np.linalg.norm(np.concatenate(values)), rel=1e-12) and values
            else:
                assert row[f"norm_{factor}"] is None
