"""The simulator's log: how many rows are held out, and which clients have little to train on."""

import json
import logging

import pandas as pd
import pytest

from fedrot.cli.commands import main
from fedrot.simulation import SimulationConfig, load_task, simulate
from fedrot.simulation.partition import small_clients

from .test_run import QUICK, write_reviews


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO, "fedrot.simulation")


@pytest.fixture
def reviews(tiny_bert, tmp_path):
    """Options of a run on 30 reviews from three sites."""
    path = write_reviews(tmp_path / "train.csv", 30, 0)
    return QUICK | {"model": str(tiny_bert), "dataset": path, "lora": {"r": 2, "target_modules": ["query"]}}


@pytest.mark.parametrize(("fraction", "held_out"), [(0.1, 3), (0.25, 8)])
def test_the_rows_that_are_held_out_are_counted(reviews, caplog, fraction, held_out):
    task = load_task(SimulationConfig(**reviews, test_fraction=fraction))
    assert len(task.test) == held_out
    assert caplog.messages == [
        f"{held_out} of 30 rows of {reviews['dataset']} are held out for testing (test_fraction {fraction:g})"
    ]


def test_nothing_is_held_out_beside_test_data(reviews, caplog):
    load_task(SimulationConfig(**reviews, test_dataset=reviews["dataset"]))
    assert caplog.messages == []


@pytest.mark.parametrize(("partition", "column", "batch"), [("dirichlet", None, 8), ("column", "site", 10)])
def test_clients_with_less_than_a_batch_are_named(reviews, caplog, tmp_path, partition, column, batch):
    options = {"partition": partition, "partition_column": column, "batch_size": batch}
    simulate(SimulationConfig(**reviews | options | {"rounds": 1}), tmp_path / "run", progress=False)
    sizes = pd.read_csv(tmp_path / "run" / "partition.csv", index_col="client")["size"]
    small = {str(client): size for client, size in sizes.items() if size < batch}
    assert small, "the partition shows nothing"
    (said,) = [message for message in caplog.messages if "fewer examples" in message]
    names = ", ".join(f"{client} ({size})" for client, size in small.items())
    assert said == (
        f"{len(small)} of {len(sizes)} clients have fewer examples than a batch, which takes {batch}, and repeat some in "
        f"every step: client {names}"
    )


def test_clients_with_a_batch_are_not_named():
    assert small_clients(pd.DataFrame({"size": [4, 5]}), 4) is None
    assert "client 0 (4)" in small_clients(pd.DataFrame({"size": [4, 5]}), 5)


def test_many_clients_are_counted():
    said = small_clients(pd.DataFrame({"size": [1] * 50}), 2)
    assert said.startswith("50 of 50 clients") and said.endswith("19 (1) and 30 more")


def test_the_commands_show_the_log_once(reviews, capsys, tmp_path):
    options = [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in reviews.items()]
    options += ["--rounds=1", "--batch_size=16", "--starts", "shared", "--methods", "fedit", "fedrot", "--seeds", "0"]
    assert main(["compare", *options, "--strengths", "1", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().err
    assert printed.count("3 of 30 rows of") == 1 and printed.count("have fewer examples than a batch") == 1
    assert not logging.getLogger("fedrot.simulation").handlers
