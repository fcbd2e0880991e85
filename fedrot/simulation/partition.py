"""Sharing the training examples out among clients, and counting what each of them got."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from .config import SimulationConfig

# The most clients that a sentence names.
_NAMED = 20


def partition(
    labels: np.ndarray | None, column: np.ndarray | None, config: SimulationConfig, size: int | None = None
) -> list[np.ndarray]:
    """Share the examples out: each belongs to one client, and no client is without any.

    Args:
        labels: (n,) the class of every example, or None if examples have no classes.
        column: (n,) the value of partition_column of every example, or None.
        config: its partition, dirichlet_alpha, clients and seed count.
        size: n; needed if labels and column are None.

    Returns:
        For every client the indices of its examples, ascending.

    Raises:
        ValueError: fewer examples than clients, or classes to share out by where there are none.
    """
    rng = np.random.default_rng([config.seed, 0])
    if column is not None:
        values, client_of = np.unique(column, return_inverse=True)
        return [np.flatnonzero(client_of == i) for i in range(len(values))]
    if config.partition == "dirichlet" and labels is None:
        raise ValueError(
            "partition dirichlet shares examples out by class, and these have none; use partition iid or column"
        )
    n = len(labels) if labels is not None else size
    if n is None:
        raise ValueError("examples without classes are shared out by their number: pass size")
    if n < config.clients:
        raise ValueError(f"{n} training examples for {config.clients} clients; use fewer clients")
    if config.partition == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(n), config.clients)]
    parts: list[list[int]] = [[] for _ in range(config.clients)]
    assert labels is not None
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


def histograms(
    parts: Sequence[np.ndarray], labels: np.ndarray | None, classes: Sequence[str], column: np.ndarray | None = None
) -> pd.DataFrame:
    """Count how many examples of which class every client has.

    Args:
        parts: the clients' indices, as ``partition`` returns them.
        labels: (n,) the class of every example, from 0, or None.
        classes: the classes' names. Without any only sizes are counted.
        column: the partition_column that the parts were made by, whose values name the clients. Without it clients have
            numbers.

    Returns:
        A row per client, indexed ``client``: ``size``, then a column per class, int.
    """
    sizes = np.array([[len(part)] for part in parts])
    if labels is not None and len(classes):
        counts = np.stack([np.bincount(labels[part], minlength=len(classes)) for part in parts])
    else:
        counts, classes = np.zeros((len(parts), 0), dtype=int), []
    clients = range(len(parts)) if column is None else np.unique(column).astype(str)
    return pd.DataFrame(np.hstack([sizes, counts]), pd.Index(clients, name="client"), ["size", *classes])


def small_clients(table: pd.DataFrame, batch_size: int) -> str | None:
    """Say which clients have fewer examples than a batch takes, and so have some of them twice in every step.

    Args:
        table: as ``histograms`` returns it.
        batch_size: the number of examples per step and client.

    Returns:
        A sentence, or None if there are no such clients.
    """
    small = table["size"][table["size"] < batch_size]
    if small.empty:
        return None
    named = ", ".join(f"{client} ({size})" for client, size in small.head(_NAMED).items())
    more = f" and {len(small) - _NAMED} more" if len(small) > _NAMED else ""
    return (
        f"{len(small)} of {len(table)} clients have fewer examples than a batch, which takes {batch_size}, and repeat some "
        f"in every step: client {named}{more}"
    )


def plot_partition(table: pd.DataFrame, path: Path) -> Figure:
    """Plot a bar per client: its examples, in the classes' colours if there are any.

    Args:
        table: as ``histograms`` returns it.
        path: the PNG to write.

    Returns:
        The figure.
    """
    counts = table.iloc[:, 1:] if table.shape[1] > 1 else table
    names, n = [str(client) for client in table.index], len(table)
    numbered = table.index.dtype.kind == "i"
    figure = Figure(figsize=(min(4.5 + 0.18 * n, 15), 4), layout="constrained")
    axis = figure.subplots()
    palette = colormaps["tab10" if counts.shape[1] <= 10 else "tab20" if counts.shape[1] <= 20 else "turbo"]
    bottom = np.zeros(n)
    for i, (label, column) in enumerate(counts.items()):
        colour = palette(i) if palette.N <= 20 else palette(i / (counts.shape[1] - 1))
        axis.bar(range(n), column, 0.8, bottom, label=str(label), color=colour)
        bottom += column.to_numpy()
    step = max(1, n // 25) if numbered else 1  # numbers may be left out, names not
    axis.set_xticks(range(0, n, step), names[::step], rotation=90 if max(map(len, names)) > 4 else 0)
    axis.set(xlabel="client", ylabel="examples", xlim=(-0.6, n - 0.4))
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    if table.shape[1] > 1:
        handles, labels = axis.get_legend_handles_labels()
        columns = -(-len(labels) // 16)
        # In the order of the bars, the last class on top.
        figure.legend(handles[::-1], labels[::-1], title="class", loc="outside right upper", ncols=columns, frameon=False)
    figure.savefig(path, dpi=120)
    return figure
