"""Clients whose texts are of like lengths go through the model together."""

import itertools

import numpy as np
import pytest
import torch

from fedrot.simulation.training import local_training
from fedrot.simulation.training.lengths import client_lengths, client_of_longest, group_by_length, group_clients

from .test_dropout import CLIENTS, assert_same, bert, train


def cost(groups, lengths, rows, overhead):
    return sum(overhead + len(group) * rows * max(lengths[client] for client in group) for group in groups)


def partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            for more in partitions([x for x in rest if x not in others]):
                yield [[first, *others], *more]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("overhead", [0, 5, 20, 1000])
def test_no_grouping_costs_less(overhead, seed):
    lengths = np.random.default_rng(seed).integers(1, 20, 6).tolist()
    groups = group_clients(lengths, 2, overhead)
    assert sorted(itertools.chain(*groups)) == list(range(6))
    assert all(lengths[group[-1]] == max(lengths[client] for client in group) for group in groups)
    assert cost(groups, lengths, 2, overhead) == min(cost(p, lengths, 2, overhead) for p in partitions(list(range(6))))


def test_groups_have_their_own_rows_without_padding_they_do_not_need():
    mask = torch.zeros(6, 9, dtype=torch.long)
    for row, length in enumerate([3, 2, 9, 1, 2, 4]):  # of clients with longest 3, 9, 4
        mask[row, :length] = 1
    inputs = {"input_ids": torch.arange(54).view(6, 9), "attention_mask": mask, "labels": torch.arange(6)}
    assert client_lengths(inputs, 3) == [3, 9, 4]
    assert client_of_longest(inputs, 3) == 1
    (short, first), (long, second) = group_by_length(inputs, 3, 5.0)
    assert (short, long) == ([0, 2], [1])
    assert torch.equal(first["input_ids"], inputs["input_ids"][[0, 1, 4, 5], :4])
    assert torch.equal(second["attention_mask"], mask[2:4])
    assert first["labels"].tolist() == [0, 1, 4, 5]


def test_padding_at_the_front_is_left():
    inputs = {"attention_mask": torch.tensor([[0, 1, 1], [0, 0, 1]])}
    assert client_lengths(inputs, 2) == [3, 3]


def test_images_have_no_lengths():
    inputs = {"pixel_values": torch.zeros(4, 1, 8, 8), "labels": torch.zeros(4)}
    [(clients, all_of_them)] = group_by_length(inputs, 2, 0.0)
    assert client_of_longest(inputs, 2) == 0
    assert clients == [0, 1] and all_of_them is inputs


def test_clients_train_the_same_in_groups(monkeypatch):
    together = train(bert(), CLIENTS)
    monkeypatch.setattr(local_training, "pass_overhead", lambda model, device: 0.0)
    assert_same(together, train(bert(), CLIENTS))
