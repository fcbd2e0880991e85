"""Attackers in a simulated federation, and clients that send their updates in bases of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedrot.adapters.keys import factor_of
from fedrot.simulation.clients import Clients
from fedrot.simulation.tasks import Task

State = Mapping[str, Tensor]

FACTORS = {"sign flip": -1.0, "sign flip × 3": -3.0, "scaled × 10": 10.0}  # of the attacker's own change
NOISE = 3.0  # the norm of random changes, in that of the attacker's own change


@dataclass(frozen=True)
class Scenario:
    """What attackers do, and who sends its update in another basis.

    Attributes:
        name: the scenario's name in tables.
        attack: "none", a name in ``FACTORS``, "random" (noise of 3 times the norm of the own change) or "label flip"
            (trained on label 9 − y).
        rotated: "none", "attackers" or "honest": whose factors are sent as BR and RᵀA, R drawn anew for each adapter.
    """

    name: str
    attack: str
    rotated: str = "none"


SCENARIOS = (
    Scenario("no attack", "none"),
    Scenario("sign flip", "sign flip"),
    Scenario("sign flip × 3", "sign flip × 3"),
    Scenario("scaled × 10", "scaled × 10"),
    Scenario("random", "random"),
    Scenario("label flip", "label flip"),
    Scenario("sign flip, attackers rotated", "sign flip", "attackers"),
    Scenario("no attack, honest rotated", "none", "honest"),
    Scenario("sign flip, honest rotated", "sign flip", "honest"),
    Scenario("sign flip × 3, honest rotated", "sign flip × 3", "honest"),
)


def flip_labels(clients: Clients, attackers: Sequence[int]) -> None:
    """Have attackers train on the label 9 − y in place of y."""
    task: Task = clients.task
    labels = np.array(task.train["label"])
    theirs = np.concatenate([clients.examples[c] for c in attackers])
    labels[theirs] = 9 - labels[theirs]
    train = task.train.remove_columns("label").add_column("label", labels.tolist())
    clients.task = replace(task, train=train)


def sent(
    scenario: Scenario, client: int, state: State, start: State, *, attacks: bool, seed: Sequence[int]
) -> dict[str, Tensor]:
    """What a client sends.

    Args:
        scenario: what is attacked, and who is rotated.
        client: the client's number.
        state: the adapter that it trained.
        start: the adapter that it started from.
        attacks: whether it is an attacker.
        seed: of the round.
    """
    generator = torch.Generator().manual_seed(int(np.random.default_rng([*seed, client]).integers(2**62)))
    changes = {name: x - start[name] for name, x in state.items()}
    if attacks and scenario.attack == "random":
        size = sum(x.square().sum() for x in changes.values()).sqrt()
        changes = {name: torch.randn(x.shape, generator=generator) for name, x in changes.items()}
        drawn = sum(x.square().sum() for x in changes.values()).sqrt()
        changes = {name: NOISE * size / drawn * x for name, x in changes.items()}
    elif attacks:
        changes = {name: FACTORS.get(scenario.attack, 1.0) * x for name, x in changes.items()}
    found = {name: start[name] + x for name, x in changes.items()}
    if scenario.rotated == ("attackers" if attacks else "honest"):
        found = _rotated(found, generator)
    return found


def _rotated(state: State, generator: torch.Generator) -> dict[str, Tensor]:
    """The same updates B·A in another basis."""
    found = dict(state)
    for name, A in state.items():
        if factor_of(name) == "A":
            R = torch.linalg.qr(torch.randn(len(A), len(A), generator=generator)).Q
            partner = name.replace(".lora_A.", ".lora_B.")
            found[name], found[partner] = R.T @ A, state[partner] @ R
    return found
