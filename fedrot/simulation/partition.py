"""Sharing the training examples out among clients."""

import numpy as np

from .config import SimulationConfig


def partition(labels: np.ndarray, column: np.ndarray | None, config: SimulationConfig) -> list[np.ndarray]:
    """For every client the indices of its examples; each example belongs to one client, and none is without.

    Args:
        labels: (n,) class of every example.
        column: (n,) value of partition_column, or None.
        config: its partition, dirichlet_alpha, clients and seed.

    Raises:
        ValueError: fewer examples than clients.
    """
    rng = np.random.default_rng([config.seed, 0])
    if column is not None:
        values, client_of = np.unique(column, return_inverse=True)
        return [np.flatnonzero(client_of == i) for i in range(len(values))]
    if len(labels) < config.clients:
        raise ValueError(f"{len(labels)} training examples for {config.clients} clients; use fewer clients")
    if config.partition == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), config.clients)]
    parts: list[list[int]] = [[] for _ in range(config.clients)]
    for label in np.unique(labels):
        examples = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(config.clients, config.dirichlet_alpha))
        cuts = (np.cumsum(shares)[:-1] * len(examples)).round().astype(int)
        for part, piece in zip(parts, np.split(examples, cuts), strict=True):
            part.extend(piece.tolist())
    for part in parts:  # a small α leaves clients without any example: the largest gives them one
        if not part:
            part.append(max(parts, key=len).pop())
    return [np.sort(part) for part in parts]
