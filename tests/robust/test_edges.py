"""The simulator, Flower and NVIDIA FLARE refuse the attackers that the aggregator refuses."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba

from fedrot.simulation import SimulationConfig, simulate
from fedrot.simulation.distances import plot_distances

from ..refusals import refused

QUICK = {"clients": 5, "rounds": 2, "local_steps": 1, "batch_size": 2, "max_test_examples": 20, "max_train_examples": 200}


def run(folder, **options):
    return simulate(SimulationConfig(**QUICK | options), folder, progress=False)


def test_a_simulation_says_who_was_refused(tmp_path):
    result = run(tmp_path / "run", robust="multi-krum", byzantine=1, clip="median")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows == result.metrics
    for row in rows:
        (left_out,) = row["refused"]
        assert row["client_weights"][str(left_out)] == 0 and sum(w > 0 for w in row["client_weights"].values()) == 4
        assert 0 < len(row["clipped"]) <= 2 and all(0 < left < 1 for left in row["clipped"].values())
        assert row["train_loss"] > 0
    table = pd.read_csv(tmp_path / "run/distances.csv", index_col="client")
    assert list(table.index) == [0, 1, 2, 3, 4] and (table.to_numpy().diagonal() == 0).all()
    assert (tmp_path / "run/distances.png").exists()


def test_without_a_rule_there_are_no_distances(tmp_path):
    row = run(tmp_path / "run").metrics[-1]
    assert not {"refused", "clipped", "client_weights"} & row.keys()
    assert not list((tmp_path / "run").glob("distances.*"))


def test_an_interrupted_run_goes_on_with_its_rule(tmp_path):
    class Interrupted(Exception):
        pass

    def stop(done):
        raise Interrupted

    options = {"robust": "geometric-median", "geometry": True}
    whole = run(tmp_path / "whole", **options)
    config = SimulationConfig(**QUICK | options)
    with pytest.raises(Interrupted):
        simulate(config, tmp_path / "cut", progress=False, on_round=stop)
    cut = simulate(config, tmp_path / "cut", resume=True, progress=False)
    assert cut.metrics == whole.metrics
    for name in ("distances.csv", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.drawn
def test_the_heat_map_shows_every_distance_and_who_was_refused(n, tmp_path):
    distances = torch.rand(n, n, generator=torch.Generator().manual_seed(0))
    names = [str(i) for i in range(n)]
    table = pd.DataFrame((distances + distances.T).fill_diagonal_(0).numpy(), index=names, columns=names)
    figure = plot_distances(table, [2], tmp_path / "distances.png")
    assert Path(tmp_path / "distances.png").read_bytes()[:4] == b"\x89PNG"
    axis = figure.axes[0]
    assert (axis.images[0].get_array() == table.to_numpy()).all()
    red = [label.get_text() for label in axis.get_xticklabels() if to_rgba(label.get_color()) == to_rgba("tab:red")]
    assert red == ["2"] and len(axis.texts) == (n * n if n <= 12 else 0)


def test_too_few_clients_end_a_simulation_by_name(tmp_path):
    with refused("robust='krum' needs at least 2f + 3 = 7", "has 5"):
        run(tmp_path / "run", robust="krum", byzantine=2)
