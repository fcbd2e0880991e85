"""How examples are shared out."""

import numpy as np
import pytest

from fedrot.simulation import SimulationConfig
from fedrot.simulation.partition import partition

LABELS = np.random.default_rng(0).integers(0, 10, 1000)


def share_out(labels=LABELS, column=None, **options):
    return partition(labels, column, SimulationConfig(**options))


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
