"""``fedrot simulate`` as typed: a configuration, options over it, and wrong ones, which leave no run."""

import json
import re

import pytest
import yaml

from fedrot.cli.commands import main
from fedrot.simulation import SimulationConfig

SHORT = ["--rounds=1", "--local_steps=2", "--clients=3", "--batch_size=4"]


def test_simulate_takes_yaml_and_options(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("method: fedit\nlr: 3e-3\nlora: {r: 2, lora_alpha: 4}\n")
    output = tmp_path / "run"
    options = ["--config", str(tmp_path / "config.yaml"), "--lora.r", "3", "--output", str(output), *SHORT]
    assert main(["simulate", *options]) == 0
    config = SimulationConfig(**yaml.safe_load((output / "config.yaml").read_text()))
    assert (config.method, config.lr, config.lora) == ("fedit", 3e-3, {"r": 3, "lora_alpha": 4})
    adapter = json.loads((output / "adapter/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (3, 4)
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metod: fedit", "metod"),
        ("rounds: 2.5", "rounds"),
        ("partition: diriclet", "partition"),
    ],
)
def test_a_wrong_configuration_names_the_field(tmp_path, capsys, text, message):
    (tmp_path / "config.yaml").write_text(text)
    assert main(["simulate", "--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method=fedavg"], "unknown method 'fedavg'"),
        (["--strength=-1"], "strength must be between"),
        (["--rounds=0"], "rounds must be at least 1"),
        (["--lora.rank=4"], "lora: .*rank"),
        (["--partition=column"], "partition_column go together"),
        (["--task=text-classification"], "the task of digits is image-classification"),
        (["--dataset=glue"], 'the model "digits" and the dataset "digits" go together'),
    ],
)
def test_wrong_values_leave_no_run(tmp_path, capsys, options, message):
    assert main(["simulate", *options, "--output", str(tmp_path / "run")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
