"""Rounds for the tests of privacy: strategies over clients that align, and what each round gives by float64 arithmetic."""

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import torch
from flwr.app import ConfigRecord
from flwr.serverapp import NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod
from torch import Tensor

from fedrot import align
from fedrot.flower import from_arrays, to_arrays

from ..peft_models import turned_clients
from .privacy_apps import CLIENTS, KIND, trained

ROUNDS = 2  # one aligns B, one A
START = turned_clients(KIND, 0)[0]
EQUAL, UNEQUAL = [1] * CLIENTS, [1, 2, 3, 4]
FEDAVG = {"fraction_evaluate": 0.0, "min_train_nodes": CLIENTS, "min_available_nodes": CLIENTS}
ALONE = FEDAVG | {"min_train_nodes": 1, "min_available_nodes": 1}
SEED = 5
# Norms that no update of these clients reaches, and that all of them exceed.
LOOSE, BINDING = 100.0, 1.0
State = Mapping[str, Tensor]


def run(strategy, grid, mods, weights, start=START):
    """The adapter after every round, from the one before the first, and the strategy."""
    config, adapters = ConfigRecord({"app": mods, "weights": weights}), {}
    np.random.seed(SEED)
    strategy.start(grid, to_arrays(start, widen=True), ROUNDS, train_config=config, evaluate_fn=adapters.__setitem__)
    return SimpleNamespace(adapters=[from_arrays(adapters[r]) for r in range(ROUNDS + 1)], strategy=strategy)


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


def furthest(a: State, b: State) -> float:
    """The largest difference of two adapters."""
    assert a.keys() == b.keys()
    return max(float((x - b[key]).abs().max()) for key, x in a.items())


def rounding(like: State) -> float:
    """Some thirty float32 roundings: of R, its product, the clipped difference, shares, sums, noise and the reply."""
    return 16 * torch.finfo(torch.float32).eps * max(float(x.abs().max()) for x in like.values())


def each_round(run):
    """Round, the adapter that it started from, and its result."""
    return [(r, run.adapters[r - 1], run.adapters[r]) for r in range(1, ROUNDS + 1)]
