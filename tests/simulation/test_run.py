"""The simulator as its users run it: on the digits, on local text files, interrupted and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForImageClassification

from fedrot.cli.commands import main
from fedrot.simulation import SimulationConfig, load_task, simulate
from fedrot.simulation.clients import Clients
from fedrot.simulation.metrics import read_metrics, write_metrics
from fedrot.simulation.tasks.digits import digits_data

QUICK = {"rounds": 3, "local_steps": 3, "clients": 4, "batch_size": 4}


@pytest.fixture
def run(task, tmp_path):
    """Runs a short simulation on the digits."""

    def start(name="run", **options):
        return simulate(SimulationConfig(**QUICK | options), tmp_path / name, task=task, progress=False)

    return start


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".jsonl", ".safetensors")}


@pytest.mark.drawn
def test_a_run_leaves_its_configuration_metrics_plot_and_adapter(run, task):
    result = run(eval_every=2, clients_per_round=3)
    assert SimulationConfig(**yaml.safe_load((result.folder / "config.yaml").read_text())) == result.config
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.metrics
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert ["accuracy" in row for row in rows] == [False, True, True]
    assert all(len(row["clients"]) == 3 and row["aggregation_error"] > 0 for row in rows)
    assert (result.folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    base = AutoModelForImageClassification.from_pretrained(result.folder / "base_model")
    model = PeftModel.from_pretrained(base, result.folder / "adapter")
    measured = task.evaluate(model, 100, torch.device("cpu"))
    assert measured["accuracy"] == result.accuracy


def test_a_run_without_errors_reports_the_rest(run, task, capsys):
    result = run(report_error=False, geometry=True)
    assert (
        [row["aggregation_error"] for row in result.metrics]
        == [row["relative_error"] for row in result.metrics]
        == [None] * 3
    )
    assert [row["round"] for row in result.metrics] == [1, 2, 3] and result.accuracy > 0
    measured = run("measured", geometry=True)
    assert (measured.folder / "adapter/adapter_model.safetensors").read_bytes() == (
        result.folder / "adapter/adapter_model.safetensors"
    ).read_bytes()
    simulate(result.config, tmp := result.folder.with_name("shown"), task=task)
    assert "round=3/3" in (shown := capsys.readouterr().err) and "relative_error" not in shown
    assert read_metrics(tmp / "metrics.jsonl", 3) == result.metrics


def test_metrics_are_those_of_the_rounds_that_are_done(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path, 3) == []
    rows = [{"round": number, "loss": number / 10} for number in (1, 2, 3)]
    write_metrics(path, rows)
    assert [read_metrics(path, done) for done in range(5)] == [[], rows[:1], rows[:2], rows, rows]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_metrics(path, [{"round": 1, "loss": np.nan}])
    assert read_metrics(path, 3) == rows and [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    write_metrics(path, [{"round": number} for number in (0, 1, 2)])
    with pytest.raises(ValueError, match=r"counts rounds from 0, as fedrot 0\.1 did; start another run"):
        read_metrics(path, 3)


def test_training_learns(run, task):
    before = task.evaluate(task.base_model, 100, torch.device("cpu"))["accuracy"]
    assert run(local_steps=20, batch_size=16).accuracy > before + 0.2


@pytest.mark.parametrize("start", ["shared", "independent"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(run, start):
    first, again = run("first", start=start), run("again", start=start)
    assert files(first.folder) == files(again.folder)
    assert files(first.folder) != files(run("other", start=start, seed=1).folder)


def test_strength_zero_is_fedit_to_the_bit(run):
    fedit, unrotated = run("fedit", method="fedit"), run("unrotated", strength=0.0)
    assert (fedit.folder / "adapter/adapter_model.safetensors").read_bytes() == (
        unrotated.folder / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_rotation_angles_follow_the_paper(run):
    rows = run(rounds=2).metrics
    assert rows[0]["rotation_angle"] == 0  # B of the common start is zero
    assert rows[1]["rotation_angle"] > 0


def test_independent_starts_differ_and_lose_more_to_averaging(run):
    shared, independent = run("shared", rounds=1, method="fedit"), run("own", rounds=1, method="fedit", start="independent")
    rotated = run("rotated", rounds=1, start="independent", strength=1.0)
    assert independent.metrics[0]["relative_error"] > 1.5 * shared.metrics[0]["relative_error"]
    assert rotated.metrics[0]["relative_error"] < independent.metrics[0]["relative_error"]


def test_passes_of_fewer_clients_train_the_same(task):
    trained = []
    for size in (None, 3):
        config = SimulationConfig(**QUICK, clients_per_pass=size)
        clients = Clients(task, config)
        trained.append(clients.train(0, [0, 1, 2, 3], [clients.state()] * 4, lambda n: None))
    assert len(trained[0]) == 4 and all(state for state, _ in trained[0])
    for (together, loss), (apart, loss_apart) in zip(*trained, strict=True):
        assert loss == pytest.approx(loss_apart, rel=1e-5)
        for name, value in together.items():
            torch.testing.assert_close(apart[name], value, rtol=1e-3, atol=1e-5)


def test_an_interrupted_run_resumes_to_the_bits_of_an_uninterrupted_one(tmp_path):
    options = ["--rounds=12", "--local-steps=5", "--clients=4", "--batch-size=4", "--lora.lora_dropout=0.1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["simulate", *options, f"--output={whole}"]) == 0

    # What runs in the background of a shell, these tests too, has been told to ignore interrupts, and so would its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "fedrot.cli", "simulate", *options, f"--output={cut}"]
    # One thread, as here: some sums depend on the number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    while not (cut / "metrics.jsonl").exists() or len((cut / "metrics.jsonl").read_text().splitlines()) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate()
    assert process.returncode == 130
    assert f"go on with: fedrot simulate --resume {cut}" in messages
    assert not (cut / "adapter").exists()

    # As if the power had failed between a round's metrics and its checkpoint, and within a line.
    with (cut / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"round": 12, "method": "fedrot"}\n{"round": 13, "met')
    assert main(["simulate", f"--resume={cut}"]) == 0
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "base_model/model.safetensors", "config.yaml"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def test_an_existing_output_folder_is_left_alone(run):
    run("twice")
    with pytest.raises(FileExistsError, match="twice exists"):
        run("twice")


def write_reviews(path, n, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        label = int(rng.integers(2))
        word = [["bad", "poor"], ["good", "fine"]][label][rng.integers(2)]
        rows.append(
            {"text": f"a {word} film", "other": "a play", "label": ["no", "yes"][label], "site": f"s{rng.integers(3)}"}
        )
    data = Dataset.from_list(rows)
    writers = {".csv": data.to_csv, ".tsv": lambda p: data.to_csv(p, sep="\t"), ".jsonl": data.to_json}
    writers[path.suffix](str(path))
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_text_from_local_files(tiny_bert, tmp_path, suffix):
    options = {"model": str(tiny_bert), "text_column": "text", "lora": {"r": 2, "target_modules": ["query", "value"]}}
    data = {
        "dataset": write_reviews(tmp_path / f"train{suffix}", 60, 0),
        "test_dataset": write_reviews(tmp_path / f"t{suffix}", 40, 1),
    }
    if suffix == ".csv":
        data["test_dataset"] = None  # a tenth of the training file instead
    data["partition"] = "iid"
    if suffix == ".tsv":
        data |= {"partition": "column", "partition_column": "site", "text_pair_column": "other"}
    config = SimulationConfig(**options, **data, rounds=3, clients=3, local_steps=20, lr=0.02)
    result = simulate(config, tmp_path / "run", progress=False)
    assert result.accuracy > 0.9
    assert result.metrics[0]["clients"] == [0, 1, 2]
    adapter = json.loads((result.folder / "adapter/adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_CLS"


def test_missing_columns_and_unseen_classes_are_named(tiny_bert, tmp_path):
    options = {"model": str(tiny_bert), "dataset": write_reviews(tmp_path / "train.csv", 20, 0)}
    Dataset.from_list([{"text": "a film", "label": "perhaps"}]).to_csv(tmp_path / "test.csv")
    with pytest.raises(ValueError, match="1 classes that the training data lacks, such as: perhaps"):
        load_task(SimulationConfig(**options, test_dataset=str(tmp_path / "test.csv")))
    with pytest.raises(ValueError, match=r"nowhere.csv is not a file"):
        load_task(SimulationConfig(model=str(tiny_bert), dataset=str(tmp_path / "nowhere.csv")))


def test_the_digits_that_clients_learn_are_not_those_the_server_tests():
    train, test = digits_data()
    seen = {np.array(x).tobytes() for x in train["pixel_values"]}
    assert not any(np.array(x).tobytes() in seen for x in test["pixel_values"])


def test_a_run_that_was_finished_can_be_resumed_to_no_effect(run, task):
    result = run()
    before = files(result.folder)
    again = simulate(result.config, result.folder, task=task, resume=True, progress=False)
    assert again.metrics == result.metrics and files(result.folder) == before
    shutil.rmtree(result.folder / "adapter")
    simulate(result.config, result.folder, task=task, resume=True, progress=False)
    assert files(result.folder) == before


def test_a_run_is_resumed_only_as_it_was(run, task):
    result = run()
    other = replace(result.config, lr=0.5, method="fedit")
    with pytest.raises(ValueError, match="was run with another method, strength, lr; resume it as it was"):
        simulate(other, result.folder, task=task, resume=True, progress=False)


def test_a_command_resumes_only_its_own_runs(run, capsys):
    folder = run().folder
    assert main(["compare", f"--resume={folder}"]) == 1
    assert f"go on with: fedrot simulate --resume {folder}" in capsys.readouterr().err
    assert main(["simulate", f"--resume={folder}", "--rounds=9"]) == 1
    assert "give no other option" in capsys.readouterr().err
    assert main(["simulate", "--resume=nowhere"]) == 1
    assert "takes the folder of an earlier run" in capsys.readouterr().err
