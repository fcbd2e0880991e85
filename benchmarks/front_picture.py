"""The picture at the top of the README: what averaging factors destroys, and where rotation gains accuracy.

python -m benchmarks.front_picture --output docs/images/front.png

Left, computed by ``fedrot.aggregate``: five clients hold the same update BA, each in a basis of its own. Right, from the
finished comparisons in docs/results/regime-*: accuracy of FedRot (λ = 1) minus FedIT's, mean of the first two rounds.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import fedrot
import fedrot_kernels

from .regime import gains

_RESULTS = Path(__file__).parent.parent / "docs" / "results"
_STARTS = {"shared": ("#1f6fb4", "one shared start"), "independent": ("#e07b00", "each client its own start")}
_GROUPS = {
    "regime-adamw-lr": "learning rate,\nAdamW",
    "regime-sgd-lr": "learning rate,\nSGD",
    "regime-local-steps": "local steps",
    "regime-alphas": "Dirichlet α",
}
_CLIENTS, _RANK, _SIZE, _SEED = 5, 4, 48, 0
_KEYS = tuple(f"base_model.model.layer.lora_{factor}.weight" for factor in "AB")


def same_update_in_rotated_bases() -> list[dict[str, Tensor]]:
    """State dicts of clients that hold one smooth update of rank 4, each in a random basis, float64."""
    x = torch.linspace(0, 1, _SIZE, dtype=torch.float64)
    waves = torch.stack([torch.sin(torch.pi * (k + 1) * x + 0.4 * k) for k in range(_RANK)])
    A, B = waves, (waves.flip(0) * torch.tensor([1.0, -0.8, 0.6, 0.9], dtype=torch.float64)[:, None]).T
    numbers = torch.Generator().manual_seed(_SEED)
    R = fedrot_kernels.polar(torch.randn(_CLIENTS, _RANK, _RANK, generator=numbers, dtype=torch.float64))
    R = R * torch.linalg.det(R).sign()[:, None, None] ** torch.tensor([1.0] + [0.0] * (_RANK - 1)).double()
    return [dict(zip(_KEYS, (Ri.T @ A, B @ Ri), strict=True)) for Ri in R]


def _heatmaps(axes: list[Axes]) -> None:
    clients = same_update_in_rotated_bases()
    plain = fedrot.aggregate(clients, strength=0)
    rotated = fedrot.aggregate(clients, align_on="A", strength=1)
    update = torch.stack([client[_KEYS[1]] @ client[_KEYS[0]] for client in clients]).mean(0)
    limit = float(update.abs().max())
    shown: list[tuple[str, Tensor, float | None]] = [("mean of the updates", update, None)]
    shown += [
        (title, result.state_dict[_KEYS[1]] @ result.state_dict[_KEYS[0]], result.report.relative_error)
        for title, result in (("mean of the factors", plain), ("factors rotated first", rotated))
    ]
    for axis, (title, image, error) in zip(axes, shown, strict=True):
        axis.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("what the clients learned" if error is None else f"lost: {100 * error:.0f} %", fontsize=11)


def _regime(axis: Axes) -> None:
    place, ticks, labels = 0.0, [], []
    for name, title in _GROUPS.items():
        config = yaml.safe_load((_RESULTS / name / "config.yaml").read_text("utf-8"))
        (field,) = config["vary"]
        table = gains(pd.read_csv(_RESULTS / name / "results.csv"), field)
        values = sorted(table[field].unique())
        places = place + np.arange(len(values))
        for start, (color, label) in _STARTS.items():
            early = table[table["start"] == start].groupby(field)["early"]
            axis.errorbar(
                places,
                early.mean()[values],
                early.std()[values],
                color=color,
                marker="o",
                capsize=3,
                label=label if place == 0 else None,
            )
        ticks += [*places]
        labels += [f"{value:g}".replace("0.", ".") for value in values]
        axis.text(places.mean(), 0.215, title, ha="center", va="center", fontsize=10)
        place += len(values) + 0.4
    axis.axhline(0, color="grey", linewidth=1)
    axis.set_xticks(ticks, labels, fontsize=9)
    axis.set_ylim(-0.06, 0.25)
    axis.set_ylabel("accuracy gained by rotation,\nrounds 1 and 2", fontsize=11)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2, frameon=False, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)


def draw(path: Path) -> None:
    """Write the picture as PNG."""
    figure = Figure(figsize=(13, 3.7))
    grid = figure.add_gridspec(1, 4, width_ratios=[1, 1, 1, 3.1], left=0.01, right=0.995, top=0.9, bottom=0.17, wspace=0.08)
    left = [figure.add_subplot(grid[0, i]) for i in range(3)]
    _heatmaps(left)
    inner = grid[0, 3].subgridspec(1, 2, width_ratios=[0.13, 1])
    _regime(figure.add_subplot(inner[0, 1]))
    figure.text(0.01, 0.93, "Five clients hold one update, each in its own basis", fontsize=13, weight="bold")
    figure.text(0.505, 0.93, "Ten clients on turned digits: where that matters", fontsize=13, weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="the PNG to write")
    draw(parser.parse_args().output)
