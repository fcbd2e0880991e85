"""The cases of the benchmark of local training, and the two ways to train a round's clients."""

from dataclasses import dataclass

import torch

from fedrot.simulation.clients import Clients, State


@dataclass(frozen=True)
class Case:
    """A round of local training.

    Attributes:
        label: the model's label in the table.
        texts: whether to take the encoder and the texts that were given, or else the digits.
        clients: N, the number of clients.
        batch: the number of examples per step and client.
        steps: the number of local steps.
        target: how many times faster one pass should be, on two cores.
    """

    label: str
    texts: bool
    clients: int
    batch: int
    steps: int
    target: float


CASES = (
    Case("digits ViT", False, 3, 8, 20, 1.0),
    Case("digits ViT", False, 10, 8, 20, 2.0),
    Case("digits ViT", False, 50, 8, 20, 3.5),
    Case("encoder", True, 10, 1, 5, 2.5),
    Case("encoder", True, 10, 8, 3, 1.0),
    Case("encoder", True, 3, 8, 3, 1.0),
)


def one_pass(clients: Clients, start: State) -> list[State]:
    """Train a round as the simulation does."""
    everyone = list(range(len(clients.examples)))
    return [state for state, _ in clients.train(0, everyone, [start] * len(everyone), lambda _: None)]


def one_at_a_time(clients: Clients, start: State) -> list[State]:
    """Train the same round by ordinary PEFT training, a client at a time."""
    model, config = clients.model.train(), clients.config
    trained = []
    for client in range(len(clients.examples)):
        clients.load(start)
        optimizer = torch.optim.AdamW(clients.parameters.values(), config.lr, weight_decay=config.weight_decay)
        for indices in clients.batches(0, client):
            inputs = clients.task.collate(clients.task.train, indices, clients.device)
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(clients.state())
    return trained
