"""Metrics and names that clients send, right and wrong, in training and in evaluation."""

import logging
import math

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord

from fedrot.flower import FedRot, to_arrays

from .local_grid import LocalGrid, client_app
from .strategy_runs import start_of
from .wrong_replies import KIND, changed, metrics, run


def test_names_are_one_short_line_and_two_of_a_name_are_told_apart():
    names = ["client 0\nround 1: all is well", "twin", "twin", "x" * 500, "twin (node 98)", "node 94", ""]
    grid = LocalGrid({c: client_app(KIND, name=name) for c, name in enumerate(names)})
    strategy = FedRot(fraction_evaluate=0.0)
    strategy.start(grid, to_arrays(start_of(KIND)), num_rounds=1)
    names = strategy.result.report.clients
    assert len(set(names)) == 7
    assert {"client 0 round 1: all is well", "twin (node 99)", "twin (node 98) (node 96)"} <= set(names)
    assert max(map(len, names)) == 80


def test_metrics_that_not_all_have_are_left_out_and_said_so(caplog):
    def spoil(message):
        message.content["metrics"] = MetricRecord({"num-examples": 2, "train-loss": math.nan, "f1": [0.5, 1.0]})

    everyone = LocalGrid({c: client_app(KIND, spoil=spoil) for c in range(3)})
    with caplog.at_level(logging.WARNING, "flwr"):
        result, strategy = run(spoil)
        same = FedRot(fraction_evaluate=0.0).start(everyone, to_arrays(start_of(KIND)), num_rounds=1)
    assert strategy.result.report.dropped == {}
    assert not {"train-loss", "f1"} & result.train_metrics_clientapp[1].keys()
    assert same.train_metrics_clientapp[1]["f1"] == pytest.approx([0.5, 1.0])
    assert "train-loss" not in same.train_metrics_clientapp[1]
    assert caplog.text.count("train-loss") == 2 and caplog.text.count("'f1'") == 1


def test_evaluation_drops_wrong_answers_too(caplog):
    grid = LocalGrid({c: client_app(KIND) for c in range(3)})
    strategy = FedRot()
    strategy.start(grid, to_arrays(start_of(KIND)), num_rounds=1)
    config = ConfigRecord()
    messages = list(strategy.configure_evaluate(1, to_arrays(start_of(KIND)), config, grid))
    replies = grid.send_and_receive(messages)
    whole = strategy.aggregate_evaluate(1, replies)["size"]
    del replies[0].content["metrics"]["num-examples"]
    with caplog.at_level(logging.WARNING, "flwr"):
        assert strategy.aggregate_evaluate(1, replies)["size"] == pytest.approx(whole)
    assert "evaluation of round 1: dropped client" in caplog.text
    assert strategy.aggregate_evaluate(1, []) is None


def test_an_evaluation_without_examples_names_the_clients(caplog):
    grid = LocalGrid({c: client_app(KIND) for c in range(2)})
    strategy = FedRot()
    strategy.start(grid, to_arrays(start_of(KIND)), num_rounds=1)
    messages = list(strategy.configure_evaluate(1, to_arrays(start_of(KIND)), ConfigRecord(), grid))
    replies = grid.send_and_receive(messages)
    for reply in replies:
        reply.content["metrics"]["num-examples"] = 0
    with caplog.at_level(logging.WARNING, "flwr"):
        assert strategy.aggregate_evaluate(1, replies) is None
    for client in range(2):
        assert f"evaluation of round 1: dropped client {client}: its number of examples is 0" in caplog.text


def test_reasons_are_one_short_line(caplog):
    def breaks(message):
        raise ValueError("\x1b[31mno\nround 9: dropped client 2: forged" + "x" * 10**5 + "the disk is full")

    with caplog.at_level(logging.WARNING, "flwr"):
        _, strategy = run(breaks)
        run(changed(lambda s: s | {"evil\nround 9: \x1b[31m" * 1000: torch.ones(1)}))
    (why,) = strategy.result.report.dropped.values()
    logged = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(logged) == 2
    assert why.endswith("the disk is full") and "[31m" not in why
    for text in (why, *logged):
        assert len(text) < 600 and text.isprintable()


def test_clients_metrics_do_not_pass_for_the_servers(caplog):
    grid = LocalGrid({c: client_app(KIND, spoil=metrics(num_examples=1, clients=99)) for c in range(3)})
    with caplog.at_level(logging.WARNING, "flwr"):
        result = FedRot(fraction_evaluate=0.0).start(grid, to_arrays(start_of(KIND)), num_rounds=1)
    assert result.train_metrics_clientapp[1]["clients"] == 3
    assert "'clients' is left out" in caplog.text


def test_a_metrics_function_of_the_users_sees_what_clients_sent():
    seen = []

    def average(contents, weighted_by):
        seen.extend(contents)
        return MetricRecord({"highest": max(content["metrics"]["train-loss"] for content in contents)})

    grid = LocalGrid({c: client_app(KIND) for c in range(3)})
    strategy = FedRot(fraction_evaluate=0.0, train_metrics_aggr_fn=average)
    result = strategy.start(grid, to_arrays(start_of(KIND)), num_rounds=1)
    assert result.train_metrics_clientapp[1]["highest"] == 1.0
    assert [content["client"]["name"] for content in seen] == ["client 0", "client 1", "client 2"]
