"""How examples are shared out."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from fedrot.simulation import SimulationConfig
from fedrot.simulation.partition import histograms, partition, plot_partition

LABELS = np.random.default_rng(0).integers(0, 10, 1000)


CLASSES = [f"class {i}" for i in range(10)]


def share_out(labels=LABELS, column=None, size=None, **options):
    return partition(labels, column, SimulationConfig(**options), size)


def skew(parts):
    """The mean largest share of one class in a client."""
    return np.mean([np.bincount(LABELS[p]).max() / len(p) for p in parts])


@pytest.mark.parametrize("kind", ["dirichlet", "iid"])
@pytest.mark.parametrize("clients", [1, 7, 50, 1000])
def test_every_example_belongs_to_one_client_and_none_is_without(kind, clients):
    parts = share_out(partition=kind, clients=clients, dirichlet_alpha=0.05)
    assert len(parts) == clients and all(len(p) for p in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))


def test_iid_parts_are_even():
    assert {len(p) for p in share_out(partition="iid", clients=7)} == {142, 143}


def test_a_smaller_alpha_is_less_alike():
    skews = [skew(share_out(dirichlet_alpha=alpha, clients=10)) for alpha in (100, 1, 0.1)]
    assert skews == sorted(skews)
    assert skews[0] < 0.2 and skews[-1] > 0.5


def test_dirichlet_shares_have_the_expected_spread():
    """Var of one share is (1/N)(1 − 1/N)/(αN + 1)."""
    labels = np.zeros(10_000, dtype=int)
    shares = np.array([[len(p) / 10_000 for p in share_out(labels, clients=5, seed=s)] for s in range(200)])
    assert shares.var() == pytest.approx(0.2 * 0.8 / (0.5 * 5 + 1), rel=0.15)


def test_by_column_a_client_per_value():
    column = np.array(["b", "a", "b", "c"])
    parts = share_out(np.zeros(4, dtype=int), column, partition="column", partition_column="site")
    assert [p.tolist() for p in parts] == [[1], [0, 2], [3]]


def test_the_seed_decides():
    again = zip(share_out(seed=1), share_out(seed=1), strict=True)
    assert all(np.array_equal(a, b) for a, b in again)
    assert not all(len(a) == len(b) for a, b in zip(share_out(seed=1), share_out(seed=2), strict=True))


def test_more_clients_than_examples_is_an_error():
    with pytest.raises(ValueError, match="3 training examples for 10 clients"):
        share_out(np.array([0, 1, 2]))


def test_without_classes_examples_are_shared_out_evenly_or_by_column():
    parts = share_out(None, size=10, partition="iid", clients=3)
    assert sorted(map(len, parts)) == [3, 3, 4]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(10))
    by_column = share_out(None, np.array(["b", "a", "b"]), partition="column", partition_column="site")
    assert [p.tolist() for p in by_column] == [[1], [0, 2]]
    with pytest.raises(ValueError, match=r"dirichlet shares examples out by class.*use partition iid or column"):
        share_out(None, size=10)


def test_the_histogram_counts_every_example_once():
    parts = share_out(clients=7)
    table = histograms(parts, LABELS, CLASSES)
    assert table.index.tolist() == list(range(7)) and table.index.name == "client"
    assert table.columns.tolist() == ["size", *CLASSES]
    for client, part in enumerate(parts):
        assert table.loc[client, "size"] == len(part)
        assert table.loc[client, CLASSES].tolist() == [sum(LABELS[part] == k) for k in range(10)]


def test_a_class_that_no_example_has_is_counted_zero():
    table = histograms([np.array([0, 1])], np.array([1, 1]), ["no", "yes", "neither"])
    assert table.to_dict("list") == {"size": [2], "no": [0], "yes": [2], "neither": [0]}


def test_clients_by_column_have_the_names_of_its_values():
    column = np.array(["unittest", "json", "unittest"])
    parts = share_out(None, column, partition="column", partition_column="package")
    assert histograms(parts, None, [], column)["size"].to_dict() == {"json": 1, "unittest": 2}


def bars(axis):
    """(classes, clients) bottom and height of every bar."""
    return np.array([[(bar.get_y(), bar.get_height()) for bar in container] for container in axis.containers])


@pytest.mark.drawn
@pytest.mark.parametrize("clients", [3, 50, 150])
def test_the_plot_stacks_the_classes_of_every_client(clients, tmp_path):
    table = histograms(share_out(clients=clients), LABELS, CLASSES)
    figure = plot_partition(table, tmp_path / "partition.png")
    axis, drawn = figure.axes[0], bars(figure.axes[0])
    counts = table[CLASSES].to_numpy().T
    np.testing.assert_array_equal(drawn[..., 1], counts)
    np.testing.assert_array_equal(drawn[..., 0], np.cumsum(counts, axis=0) - counts)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == CLASSES[::-1]
    assert len({container[0].get_facecolor() for container in axis.containers}) == len(CLASSES)
    ticks = [text for text in axis.get_xticklabels() if text.get_text()]
    assert all(text.get_text() == f"{x:g}" for text, x in zip(ticks, axis.get_xticks(), strict=True))
    boxes = [text.get_window_extent() for text in ticks]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.drawn
def test_the_plot_of_named_clients_without_classes_shows_sizes(tmp_path):
    names = [f"package{i}" for i in range(40)]
    table = pd.DataFrame({"size": range(1, 41)}, pd.Index(names, name="client"))
    figure = plot_partition(table, tmp_path / "partition.png")
    np.testing.assert_array_equal(bars(figure.axes[0])[0, :, 1], table["size"])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == names
    assert not figure.legends


def test_many_classes_have_colours_of_their_own(tmp_path):
    labels = np.arange(400) % 40
    table = histograms([np.arange(400)], labels, [f"class {i}" for i in range(40)])
    figure = plot_partition(table, tmp_path / "partition.png")
    assert len({container[0].get_facecolor() for container in figure.axes[0].containers}) == 40
