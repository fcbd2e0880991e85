"""The distances of a round's clients in a run's folder: a table, and a heat map of it."""

from collections.abc import Collection
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ..adapters.files import replace_file
from ..robust.choice import Choice

_NUMBERED = 12  # clients up to which the heat map has the numbers
_REFUSED = "tab:red"


def write_distances(choice: Choice, path: Path) -> None:
    """Write the distances of a round's clients, a row and a column each, in place of those of the round before."""
    names = [name.removeprefix("client ") for name in choice.clients]
    table = pd.DataFrame(choice.distances, index=pd.Index(names, name="client"), columns=names)
    with replace_file(path) as temporary:
        table.to_csv(temporary)


def read_distances(path: Path) -> pd.DataFrame:
    """Read what ``write_distances`` wrote."""
    return pd.read_csv(path, index_col="client", dtype={"client": str})


def plot_distances(distances: pd.DataFrame, refused: Collection[int], path: Path) -> Figure:
    """Plot the distances ‖ΔWᵢ − ΔWⱼ‖ of a round's clients as a heat map, refused clients in red.

    Args:
        distances: a row and a column per client, by its number.
        refused: the numbers of clients that were refused.
        path: the PNG to write.

    Returns:
        The figure.
    """
    n = len(distances)
    size = min(12.0, 3 + 0.35 * n)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(distances.to_numpy(), cmap="viridis", vmin=0)
    for ticks in (axis.set_xticks, axis.set_yticks):
        ticks(range(n), distances.index)
    for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        if label.get_text() in {str(number) for number in refused}:
            label.set(color=_REFUSED, fontweight="bold")
    if n <= _NUMBERED:
        middle = distances.to_numpy().max() / 2
        for i, row in enumerate(distances.to_numpy()):
            for j, value in enumerate(row):
                axis.text(
                    j, i, f"{value:.2g}", ha="center", va="center", color="white" if value < middle else "black", size=8
                )
    axis.set(xlabel="client", ylabel="client, in red if it was refused" if refused else "client")
    figure.colorbar(image, label="‖ΔWᵢ − ΔWⱼ‖ over the whole model")
    figure.savefig(path, dpi=120)
    return figure
