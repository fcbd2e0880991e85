"""The commands as typed, with what they print and leave, and what bad input leaves behind: nothing."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model

import fedrot
from fedrot.cli.commands import main
from fedrot.simulation import SimulationConfig

SHORT = ["--rounds=1", "--local_steps=2", "--clients=3", "--batch_size=4"]


def base_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))


@pytest.fixture
def folders(tmp_path):
    """Three clients' PEFT folders."""
    paths = []
    for seed in range(3):
        model = get_peft_model(base_model(), LoraConfig(r=2, target_modules=["0", "2"]))
        torch.manual_seed(seed + 1)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p)
        paths.append(str(tmp_path / f"client{seed}"))
        model.save_pretrained(paths[-1])
    return paths


def test_aggregate_writes_what_the_api_returns(folders, tmp_path, capsys):
    output = tmp_path / "out" / "merged"
    options = ["--weights", "1", "2", "3", "--strength", "1", "--align-on", "joint", "--group", "O"]
    assert main(["aggregate", *folders, "--reference", folders[1], "--output", str(output), *options]) == 0
    expected = fedrot.aggregate(folders, [1, 2, 3], folders[1], strength=1, align_on="joint", group="O")
    state_dict, _ = fedrot.read_adapter(output)
    assert state_dict.keys() == expected.state_dict.keys()
    assert all(torch.equal(state_dict[k], v) for k, v in expected.state_dict.items())
    PeftModel.from_pretrained(base_model(), str(output))
    record = json.loads((output / "aggregation.json").read_text())
    assert record["options"]["weights"] == [1, 2, 3]
    assert record["relative_error"] == expected.report.relative_error
    printed = capsys.readouterr().out
    assert str(expected.report) in printed and str(output) in printed


def test_inspect_shows_both_errors(folders, capsys):
    assert main(["inspect", *folders, "--strength", "1"]) == 0
    printed = capsys.readouterr().out
    assert str(fedrot.aggregate(folders, strength=0).report) in printed
    assert str(fedrot.aggregate(folders, strength=1).report) in printed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--reference", "consensus"], {"reference": "consensus"}),
        (["--strength", "auto"], {"strength": "auto"}),
        (["--align-on", "error", "--group", "GL"], {"align_on": "error", "group": "GL"}),
    ],
)
def test_aligning_clients_to_each_other(folders, tmp_path, capsys, options, expected):
    assert main(["aggregate", *folders, "--output", str(tmp_path / "merged"), *options]) == 0
    found, _ = fedrot.read_adapter(tmp_path / "merged")
    result = fedrot.aggregate(folders, **expected)
    assert all(torch.equal(found[key], x) for key, x in result.state_dict.items())
    assert str(result.report) in capsys.readouterr().out
    previous = ["--reference", "consensus", "--previous", folders[1]]
    assert main(["aggregate", *folders, "--output", str(tmp_path / "turned"), *previous]) == 0
    turned, _ = fedrot.read_adapter(tmp_path / "turned")
    result = fedrot.aggregate(folders, reference="consensus", previous=folders[1])
    assert all(torch.equal(turned[key], x) for key, x in result.state_dict.items())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--weights", "1", "2"], "2 weights for 3 updates"),
        (["--weights", "1", "nan", "1"], "client 1 .* has weight nan"),
        (["--strength", "1.5"], "strength must be between 0"),
        (["--reference", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folders, tmp_path, capsys, extra, message):
    output = tmp_path / "merged"
    before = sorted(tmp_path.iterdir())
    assert main(["aggregate", *folders, "--output", str(output), *extra]) == 1
    printed = capsys.readouterr().err
    assert re.search(f"^fedrot: error: .*{message}", printed) and printed.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_output_is_refused_before_any_work(folders, tmp_path, capsys):
    (tmp_path / "merged").mkdir()
    assert main(["aggregate", "nowhere", "--output", str(tmp_path / "merged")]) == 1
    assert "merged exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["aggregate"], ["aggregate", "a", "--output", "b", "--method", "none"]]
)
def test_a_wrong_command_line_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


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


def test_the_core_needs_neither_transformers_nor_peft():
    script = (
        "import sys, fedrot, fedrot_kernels, fedrot.cli\n"
        "loaded = {'transformers', 'peft', 'datasets', 'matplotlib', 'pandas'} & sys.modules.keys()\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
