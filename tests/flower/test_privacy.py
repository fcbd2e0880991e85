"""Alignment on the client with Flower's differential privacy and secure aggregation, on its simulation engine.

Whatever those components do, they do it to aligned updates: every round's result is compared with float64 arithmetic on
the adapter that the round started from, so that noise, which is known, does not add up over rounds.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import DifferentialPrivacyClientSideFixedClipping as OlderClientSide
from flwr.server.strategy import FedAvg as OlderFedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from flwr.simulation import run_simulation
from torch import Tensor

from fedrot import aggregate
from fedrot.flower import FedRot

from .privacy_apps import CLIENTS, KEYS, LOCAL, app, noise_seed
from .privacy_rounds import (
    BINDING,
    EQUAL,
    FEDAVG,
    LOOSE,
    ROUNDS,
    SEED,
    START,
    UNEQUAL,
    State,
    accountant,
    aligned_of,
    distance,
    each_round,
    furthest,
    mean,
    rounding,
    run,
    updates_of,
)

pytestmark = pytest.mark.slow

CENTRAL = {  # name → the clients' mods, Flower's wrapper, norm, noise multiplier
    "server side, loose": ("aligned", DifferentialPrivacyServerSideFixedClipping, LOOSE, 0.02),
    "server side, binding": ("aligned", DifferentialPrivacyServerSideFixedClipping, BINDING, 0.8),
    "client side, loose": ("aligned, clipped", DifferentialPrivacyClientSideFixedClipping, LOOSE, 0.02),
    "client side, binding": ("aligned, clipped", DifferentialPrivacyClientSideFixedClipping, BINDING, 0.8),
}


@dataclass(frozen=True)
class Secure:
    """A run with SecAgg+.

    Attributes:
        options: of the workflow.
        noise: multiplier of central privacy with the binding norm; None: neither.
        broken: the client that sends NaN.
    """

    options: dict[str, float] = field(default_factory=dict)
    noise: float | None = None
    broken: int | None = None

    @property
    def workflow(self) -> SecAggPlusWorkflow:
        return SecAggPlusWorkflow(3, 2, **self.options)

    @property
    def clip(self) -> float:
        return np.inf if self.noise is None else BINDING

    @property
    def weights(self) -> dict[int, int]:
        """Of the clients that remain."""
        given = UNEQUAL if self.noise is None else EQUAL
        return {client: w for client, w in enumerate(given) if client != self.broken}


SECURE = {
    "defaults": Secure(),
    "fitted": Secure({"max_weight": 4.0, "clipping_range": 6.0}),
    "with central privacy": Secure({"max_weight": 1.0, "clipping_range": 6.0}, noise=0.8),
    "without a client whose update is NaN": Secure({"max_weight": 4.0}, broken=3),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One start of the engine, in which one strategy after the other runs: name → what its rounds were."""
    found, server = {}, ServerApp()

    @server.main()
    def main(grid, context):
        found["on the server"] = run(FedRot(**FEDAVG), grid, "plain", UNEQUAL)
        found["on the client"] = run(FedAvg(**FEDAVG), grid, "aligned", UNEQUAL)
        found["nowhere"] = run(FedAvg(**FEDAVG), grid, "plain", UNEQUAL)
        found["local"] = run(FedAvg(**FEDAVG), grid, "aligned, clipped, noised", UNEQUAL)
        for name, (mods, wrapper, clip, noise) in CENTRAL.items():
            strategy = wrapper(FedAvg(**FEDAVG), noise, clip, CLIENTS, accountant=accountant())
            found[name] = run(strategy, grid, mods, EQUAL)
        for name, secure in SECURE.items():
            found[name] = run_secure(grid, context, secure)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's default to come
        patch.setenv("FLWR_HOME", str(tmp_path_factory.mktemp("flower")))
        run_simulation(server, app, CLIENTS, backend_config=resources)
    return found


def run_secure(grid, context, secure):
    """The same on the older API, through SecAgg+, and every reply that the server got."""
    adapters, replies, send = [], [], grid.send_and_receive

    def keep(round, arrays, config):
        adapters.append({key: torch.from_numpy(x) for key, x in zip(KEYS, arrays, strict=True)})

    def listen(messages, *, timeout=None):
        received = list(send(messages, timeout=timeout))
        replies.extend(received)
        return received

    own = {"equal-weights": secure.noise is not None, "broken": -1 if secure.broken is None else secure.broken}
    strategy: Any = OlderFedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=CLIENTS,
        min_available_clients=CLIENTS,
        on_fit_config_fn=lambda round: {"server-round": round} | own,
        initial_parameters=ndarrays_to_parameters([START[key].numpy() for key in KEYS]),
        evaluate_fn=keep,
    )
    if secure.noise is not None:
        strategy = OlderClientSide(strategy, secure.noise, secure.clip, CLIENTS)
    grid.send_and_receive = listen
    np.random.seed(SEED)
    legacy = LegacyContext(context, ServerConfig(num_rounds=ROUNDS), strategy)
    DefaultWorkflow(fit_workflow=secure.workflow)(grid, legacy)
    grid.send_and_receive = send
    return SimpleNamespace(adapters=adapters, replies=replies)


def on_server(start: State, round: int, weights: Mapping[int, int]) -> dict[str, Tensor]:
    """fedrot's own aggregation of them."""
    updates = updates_of(start, round)
    return aggregate([updates[c] for c in weights], list(weights.values()), start, round=round - 1).state_dict


def noise(generator: np.random.RandomState, std: float, like: State) -> dict[str, Tensor]:
    """What Flower draws from NumPy's global generator."""
    return {key: torch.from_numpy(generator.normal(0, std, x.shape)) for key, x in like.items()}


def added(*terms: State) -> dict[str, Tensor]:
    return functools.reduce(lambda a, b: {key: x + b[key] for key, x in a.items()}, terms)


def quantisation(secure: Secure) -> float:
    """How far SecAgg+ may be from the average.

    A client multiplies by its share of max_weight, itself a whole number of steps, adds the clipping range c and rounds,
    randomly, to one of the two nearest of quantization_range steps in [−c, c]: an error below a step, beside three float32
    roundings of numbers up to 2c. The server divides the sum of all clients by the sum of shares.
    """
    workflow, steps = secure.workflow, secure.workflow.quantization_range
    shares = [round(w / workflow.max_weight * steps) / steps for w in secure.weights.values()]
    error = 2 * workflow.clipping_range / steps + 3 * workflow.clipping_range * torch.finfo(torch.float32).eps
    return len(shares) * error / sum(shares)


def test_fedavg_of_aligned_updates_is_aggregation_on_the_server(runs):
    weights = dict(enumerate(UNEQUAL))
    for where in ("on the server", "on the client"):
        for round, start, result in each_round(runs[where]):
            expected = on_server(start, round, weights)
            assert furthest(result, expected) <= rounding(expected)
    client, server, nowhere = (runs[where].adapters[-1] for where in ("on the client", "on the server", "nowhere"))
    assert furthest(client, server) <= ROUNDS * rounding(server)
    assert furthest(nowhere, server) > 0.1


@pytest.mark.parametrize("name", CENTRAL)
def test_central_privacy_clips_aligned_updates_and_adds_its_noise(runs, name):
    _, _, clip, multiplier = CENTRAL[name]
    weights, generator = dict(enumerate(EQUAL)), np.random.RandomState(SEED)
    for round, start, result in each_round(runs[name]):
        assert all((distance(u, start) > clip) == (clip == BINDING) for u in aligned_of(start, round))
        drawn = noise(generator, multiplier * clip / CLIENTS, result)
        expected = added(mean(aligned_of(start, round, clip), weights), drawn)
        assert furthest(result, expected) <= rounding(expected)
        if clip == LOOSE:
            assert furthest(result, added(on_server(start, round, weights), drawn)) <= rounding(expected)
    spent = runs[name].strategy.privacy_spent()
    assert spent.num_releases == ROUNDS and 0 < spent.epsilon < np.inf


def test_local_privacy_clips_aligned_updates_and_adds_its_noise(runs):
    std = LOCAL["sensitivity"] * np.sqrt(2 * np.log(1.25 / LOCAL["delta"])) / LOCAL["epsilon"]
    for round, start, result in each_round(runs["local"]):
        assert all(distance(u, start) > LOCAL["clipping_norm"] for u in aligned_of(start, round))
        sent = [
            added(update, noise(np.random.RandomState(noise_seed(client, round)), std, start))
            for client, update in enumerate(aligned_of(start, round, LOCAL["clipping_norm"]))
        ]
        expected = mean(sent, dict(enumerate(UNEQUAL)))
        assert furthest(result, expected) <= rounding(expected)


@pytest.mark.parametrize("name", SECURE)
def test_secure_aggregation_sums_aligned_updates(runs, name):
    secure, generator = SECURE[name], np.random.RandomState(SEED)
    for round, start, result in each_round(runs[name]):
        expected = mean(aligned_of(start, round, secure.clip), secure.weights)
        if secure.noise is not None:
            expected = added(expected, noise(generator, secure.noise * secure.clip / CLIENTS, result))
        else:
            bound = quantisation(secure) + rounding(expected)
            assert furthest(result, on_server(start, round, secure.weights)) <= bound
        assert furthest(result, expected) <= quantisation(secure) + rounding(expected)


@pytest.mark.parametrize("name", SECURE)
def test_the_server_of_secure_aggregation_sees_masked_vectors_alone(runs, name):
    secure = SECURE[name]
    contents = [reply.content for reply in runs[name].replies if reply.has_content()]
    assert not any(arrays for content in contents for arrays in content.array_records.values())
    last = [content for content in contents if Key.MASKED_PARAMETERS in content.config_records[RECORD_KEY_CONFIGS]]
    assert len(last) == ROUNDS * len(secure.weights)
    for number, content in enumerate(last):
        client, round = content.config_records["fitres.metrics"]["client"], 1 + number // len(secure.weights)
        update = aligned_of(runs[name].adapters[round - 1], round, secure.clip)[client]
        masked = [bytes_to_ndarray(x) for x in content.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]]
        numbers = np.concatenate([x.ravel() for x in masked[1:]]) / secure.workflow.modulus_range
        plain = np.concatenate([update[key].numpy().ravel() for key in KEYS])
        n = len(plain)
        # Uniform on [0, 1), and nothing to do with the update, to six standard deviations.
        assert numbers.shape == (n,)
        assert abs(numbers.mean() - 1 / 2) < 6 / np.sqrt(12 * n)
        assert abs(numbers.var() - 1 / 12) < 6 / np.sqrt(180 * n)
        assert abs(np.corrcoef(numbers, plain)[0, 1]) < 6 / np.sqrt(n)
