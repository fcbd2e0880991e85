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
from flwr.app import ConfigRecord
from flwr.clientapp.mod import fixedclipping_mod
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import DifferentialPrivacyClientSideFixedClipping as OlderClientSide
from flwr.server.strategy import FedAvg as OlderFedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from flwr.simulation import run_simulation
from peft import get_peft_model_state_dict
from torch import Tensor

from fedrot import aggregate, align
from fedrot.adapters.keys import factor_of
from fedrot.flower import FedRot, align_mod, from_arrays, to_arrays

from ..peft_models import KINDS, factor_keys, turned_clients
from .local_grid import LocalGrid, client_app, fresh_model
from .privacy_apps import CLIENTS, KEYS, KIND, LOCAL, app, message_app, noise_seed, trained

pytestmark = pytest.mark.slow

ROUNDS = 2  # one aligns B, one A
START = turned_clients(KIND, 0)[0]
EQUAL, UNEQUAL = [1] * CLIENTS, [1, 2, 3, 4]
FEDAVG = {"fraction_evaluate": 0.0, "min_train_nodes": CLIENTS, "min_available_nodes": CLIENTS}
ALONE = FEDAVG | {"min_train_nodes": 1, "min_available_nodes": 1}
SEED = 5
# Norms that no update of these clients reaches, and that all of them exceed.
LOOSE, BINDING = 100.0, 1.0
State = Mapping[str, Tensor]

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


def run(strategy, grid, mods, weights, start=START):
    """The adapter after every round, from the one before the first, and the strategy."""
    config, adapters = ConfigRecord({"app": mods, "weights": weights}), {}
    np.random.seed(SEED)
    strategy.start(grid, to_arrays(start, widen=True), ROUNDS, train_config=config, evaluate_fn=adapters.__setitem__)
    return SimpleNamespace(adapters=[from_arrays(adapters[r]) for r in range(ROUNDS + 1)], strategy=strategy)


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


def accountant():
    relation, sampling = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
    return RdpAccountant(PrivacyConfig(1e-5, CLIENTS, relation, sampling))


def updates_of(start: State, round: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """What clients of that dtype make of the adapter that the server sent."""
    sent = {key: x.to(dtype).float() for key, x in start.items()}
    return [{key: x.to(dtype) for key, x in trained(sent, client, round).items()} for client in range(CLIENTS)]


def aligned_of(start: State, round: int, clip: float = np.inf, **options) -> list[dict[str, Tensor]]:
    """Clients' updates, aligned and then clipped to a distance from where they started, in float64."""
    reference = {key: x.double() for key, x in start.items()}
    found = []
    for update in updates_of(start, round, **options):
        aligned = align({key: x.double() for key, x in update.items()}, reference, round=round - 1)
        factor = min(1.0, clip / distance(aligned, reference))
        found.append({key: x + factor * (aligned[key] - x) for key, x in reference.items()})
    return found


def distance(update: State, start: State) -> float:
    """The L2 norm that Flower clips."""
    return float(torch.cat([(update[key].double() - x.double()).flatten() for key, x in start.items()]).norm())


def mean(updates: list[dict[str, Tensor]], weights: Mapping[int, int]) -> dict[str, Tensor]:
    """Of the clients that have a weight."""
    return {key: sum(w * updates[c][key] for c, w in weights.items()) / sum(weights.values()) for key in updates[0]}


def on_server(start: State, round: int, weights: Mapping[int, int]) -> dict[str, Tensor]:
    """fedrot's own aggregation of them."""
    updates = updates_of(start, round)
    return aggregate([updates[c] for c in weights], list(weights.values()), start, round=round - 1).state_dict


def noise(generator: np.random.RandomState, std: float, like: State) -> dict[str, Tensor]:
    """What Flower draws from NumPy's global generator."""
    return {key: torch.from_numpy(generator.normal(0, std, x.shape)) for key, x in like.items()}


def added(*terms: State) -> dict[str, Tensor]:
    return functools.reduce(lambda a, b: {key: x + b[key] for key, x in a.items()}, terms)


def furthest(a: State, b: State) -> float:
    """The largest difference of two adapters."""
    assert a.keys() == b.keys()
    return max(float((x - b[key]).abs().max()) for key, x in a.items())


def rounding(like: State) -> float:
    """Some thirty float32 roundings: of R, its product, the clipped difference, shares, sums, noise and the reply."""
    return 16 * torch.finfo(torch.float32).eps * max(float(x.abs().max()) for x in like.values())


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


def each_round(run):
    """Round, the adapter that it started from, and its result."""
    return [(r, run.adapters[r - 1], run.adapters[r]) for r in range(1, ROUNDS + 1)]


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


def early():
    """An adapter as PEFT makes it, whose B has hardly moved: what B says of the basis is mostly noise."""
    state = {key: x.clone() for key, x in get_peft_model_state_dict(fresh_model(KIND)).items()}
    return moved(state, 0, 0, [key_B for _, key_B in factor_keys(state)])


def moved(state, client, round, keys=KEYS):
    """A short step, the same at every call."""
    generator = torch.Generator().manual_seed(100 * round + client)
    return {k: x + (k in keys) * 1e-3 * torch.randn(x.shape, generator=generator) for k, x in state.items()}


@pytest.mark.parametrize(
    ("mods", "inner", "bounded"),
    [
        ([align_mod], FedAvg, True),
        ([fixedclipping_mod, align_mod], FedAvg, True),
        ([], FedRot, False),
        ([align_mod, fixedclipping_mod], FedAvg, False),
    ],
    ids=["aligned, clipped by the server", "aligned, clipped", "clipped, aligned by the server", "clipped, aligned"],
)
def test_a_client_contributes_at_most_the_norm_if_it_aligns_before_clipping(mods, inner, bounded):
    """Afterwards, the rotation that brings B closer takes A further away than noise is calibrated for."""
    clip, start = 0.01, early()
    wrapper = DifferentialPrivacyClientSideFixedClipping
    if fixedclipping_mod not in mods:
        wrapper = DifferentialPrivacyServerSideFixedClipping
    grid = LocalGrid({0: message_app(KIND, mods, moved)})
    result = run(wrapper(inner(**ALONE), 0.0, clip, 1), grid, "", [1], start).adapters[1]
    alone = distance(moved(start, 0, 1), start)
    assert clip < alone < 2 * clip
    slack = rounding(start) * sum(x.numel() for x in start.values()) ** 0.5
    if bounded:
        assert distance(result, start) <= clip + slack
    else:
        assert distance(result, start) > 5 * clip


def test_the_accountant_refuses_alignment_on_the_server():
    with pytest.raises(ValueError, match=r"FedAvg\.aggregate_train"):
        DifferentialPrivacyServerSideFixedClipping(FedRot(**FEDAVG), 1.0, BINDING, CLIENTS, accountant=accountant())


@pytest.mark.parametrize(
    ("wrapper", "mods"),
    [
        (DifferentialPrivacyServerSideFixedClipping, [align_mod]),
        (DifferentialPrivacyClientSideFixedClipping, [fixedclipping_mod, align_mod]),
    ],
    ids=["server side", "client side"],
)
def test_bfloat16_is_widened_for_privacy(wrapper, mods):
    """Clients answer in the dtype that they are sent."""
    kind = KINDS["bfloat16"]
    start = turned_clients(kind, 0)[0]
    strategy = wrapper(FedAvg(**FEDAVG), 0.0, BINDING, CLIENTS)
    grid = LocalGrid({client: message_app(kind, mods) for client in range(CLIENTS)})
    for round, sent, result in each_round(run(strategy, grid, "", EQUAL, start)):
        expected = mean(aligned_of(sent, round, BINDING, dtype=torch.bfloat16), dict(enumerate(EQUAL)))
        assert all(x.dtype == torch.float32 for x in result.values())
        assert furthest(result, expected) <= rounding(expected)
    with pytest.raises(TypeError, match="safetensors"):
        strategy.start(grid, to_arrays(start), 1, train_config=ConfigRecord({"weights": EQUAL}))


@pytest.mark.parametrize(
    ("method", "config", "own"),
    [("ffa-lora", {"trained-factors": "B", "personal-factors": "A"}, "A"), ("fedsa-lora", {"personal-factors": "B"}, "B")],
)
def test_methods_that_leave_a_factor_out_run_on_plain_fedavg(method, config, own):
    """The server has no such factor, so that no noise is added to it; clients begin with the one of their model."""
    start = {key: x for key, x in START.items() if factor_of(key) != own}
    whole = get_peft_model_state_dict(fresh_model(KIND)) | start
    found = []
    for strategy, arrays, options in (
        (FedAvg(**ALONE), start, {"train_config": ConfigRecord(config)}),
        (FedRot(method=method, **ALONE), whole, {}),
    ):
        grid = LocalGrid({client: client_app(KIND) for client in range(3)})
        found.append(from_arrays(strategy.start(grid, to_arrays(arrays), ROUNDS, **options).arrays))
    on_client, on_server = found
    assert on_client.keys() == start.keys()
    assert furthest(on_client, {key: on_server[key] for key in start}) <= ROUNDS * rounding(on_server)
