"""``fedrot compare`` as typed: what its runs leave, and what is refused before anything is run."""

import json
import re

import pandas as pd
import pytest
import yaml

from fedrot.cli.commands import main
from fedrot.methods.registry import METHODS
from fedrot.simulation import SimulationConfig
from fedrot.simulation.sweep.comparison import Comparison

from .test_tables import cell

SHORT = ["--rounds=1", "--local-steps=2", "--clients=3", "--batch-size=4"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_methods_over_seeds(tmp_path, capsys):
    output = tmp_path / "comparison"
    varied = ["--methods", "fedit", "fedrot", "--strengths", "0.5", "--starts", "independent", "--seeds", "0", "1"]
    assert main(["compare", *varied, *SHORT, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    table = (output / "table.txt").read_text()
    assert table in printed
    runs = sorted(p.name for p in output.iterdir() if p.is_dir())
    assert runs == [f"independent-{v}-seed{s}" for v in ("fedit", "fedrot-0.5") for s in (0, 1)]
    assert (output / "curves.png").exists() and not (output / "sweep.png").exists()
    rows = pd.read_csv(output / "results.csv")
    assert list(rows["method"]) == ["fedit", "fedit", "fedrot", "fedrot"] and list(rows["round"]) == [1] * 4
    assert list(rows["strength"].fillna(-1)) == [-1, -1, 0.5, 0.5]
    for method, some in (("fedit", runs[:2]), ("fedrot λ=0.5", runs[2:])):
        last = [metrics(output / run)[-1] for run in some]
        (line,) = [line for line in table.splitlines() if method in line]
        assert cell([x["accuracy"] for x in last]) in line
        assert cell([x["relative_error"] for x in last]) in line

    before = {p: p.stat().st_mtime_ns for p in output.glob("*/adapter/*")}
    assert main(["compare", "--resume", str(output)]) == 0  # nothing is left to do
    assert {p: p.stat().st_mtime_ns for p in output.glob("*/adapter/*")} == before
    assert (output / "table.txt").read_text() == table
    assert main(["compare", *SHORT, "--output", str(output)]) == 1


@pytest.mark.drawn
def test_a_varied_field_has_a_column_per_value(tmp_path, capsys):
    output = tmp_path / "comparison"
    varied = ["--methods=fedit", "--starts=shared", "--seeds", "0", "1", "--vary.lora.r", "2", "3"]
    assert main(["compare", *varied, *SHORT, "--output", str(output)]) == 0
    assert sorted(p.name for p in output.iterdir() if p.is_dir()) == [
        f"shared-fedit-lora.r={r}-seed{s}" for r in (2, 3) for s in (0, 1)
    ]
    rows = pd.read_csv(output / "results.csv")
    assert list(rows["lora.r"]) == [2, 2, 3, 3]
    table = (output / "table.md").read_text()
    assert "accuracy after the last round, by lora.r\n\n| start | method | 2 | 3 |\n" in table
    for r in (2, 3):
        folders = [output / f"shared-fedit-lora.r={r}-seed{s}" for s in (0, 1)]
        for folder in folders:
            config = yaml.safe_load((folder / "config.yaml").read_text())
            assert config["lora"] == {"r": r, "lora_alpha": 16}
            assert json.loads((folder / "adapter/adapter_config.json").read_text())["r"] == r
        for measure in ("accuracy", "relative_error"):
            assert cell([metrics(folder)[-1][measure] for folder in folders]) in table
    assert (output / "sweep.png").exists()
    assert main(["compare", "--resume", str(output)]) == 0
    assert (output / "table.md").read_text() == table


def test_errors_that_no_run_measured_are_in_no_table(tmp_path, capsys):
    output = tmp_path / "out"
    varied = ["--methods", "fedit", "fedrot-consensus", "--strengths=1", "--starts=shared", "--seeds", "0", "1"]
    assert main(["compare", *varied, *SHORT, "--report-error=false", "--output", str(output)]) == 0
    assert pd.read_csv(output / "results.csv")["relative_error"].isna().all()
    header = (output / "table.md").read_text().splitlines()[0]
    assert header == "| start | method | accuracy, round 1 |"
    assert "relative error" not in capsys.readouterr().out + (output / "rounds.md").read_text()


def test_methods_that_need_a_shared_start_are_not_run_without_and_that_is_said(tmp_path, capsys):
    method = next(name for name, kind in METHODS.items() if kind.needs_shared_start)
    output = tmp_path / "comparison"
    options = ["--methods", method, "fedit", "--strengths=1", "--seeds=0", *SHORT, "--output", str(output)]
    assert main(["compare", *options]) == 0
    said = f"{method} was not run from an independent start"
    assert said in capsys.readouterr().out
    assert said in (output / "table.txt").read_text() and said in (output / "table.md").read_text()
    runs = sorted(p.name for p in output.iterdir() if p.is_dir())
    assert [r for r in runs if method in r] == [r for r in runs if r.startswith(f"shared-{method}")] != []
    with pytest.raises(ValueError, match=said):
        Comparison(methods=[method], starts=["independent"]).runs()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vary.cliens", "3", "10"], "no field 'cliens'"),
        (["--vary.clients", "3", "many"], "clients.*many"),
        (["--vary.clients", "3", "2.5"], "clients.*2.5"),
        (["--vary.clients", "3", "0"], "clients must be at least 1"),
        (["--vary.clients", "3", "3"], "has 3 twice"),
        (["--vary", "{clients: 3}"], "(?i)list"),
        (["--vary.lora.r", "2", "x"], "lora: .*x"),
        (["--vary.lora.rank", "2"], "lora: .*rank"),
        (["--vary", "{lora.r: [2], lora: [{r: 3}]}"], "lora.* cannot both be varied"),
        (["--vary.seed", "0", "1"], "seeds"),
        (["--vary.lr", "1", "2", "--per-method.fedrot.lr", "3"], "lr is varied and per_method sets it for fedrot"),
        (["--vary.lr", "1", "2", "--per-method.fedrot.lr", "[3]"], r"per_method.fedrot.lr must have 2 values.* got \[3\]"),
        (["--vary.lr", "1", "2", "--per-method.fedrot.lr", "[3, 3]"], "per_method.fedrot.lr has 3.0 twice"),
        (["--vary.lr", "1", "2", "--per-method.fedrot.lr", "[3, fast]"], "lr.*fast"),
        (["--lora-scaling=2", "--vary.lora.lora_alpha", "1", "2"], "lora_scaling sets lora.lora_alpha for all runs"),
        (["--lora-scaling=2", "--variants.a.lora.lora_alpha=1"], "lora_scaling sets lora.lora_alpha for all runs"),
        (["--lora-scaling=0"], "lora_scaling must be positive"),
        (["--per-method.fedrot.lr", "fast"], "lr.*fast"),
        (["--per-method.fedrot.strength", "0.3"], "strengths"),
        (["--per-method.fedavg.lr", "0.3"], "unknown method 'fedavg'"),
        (["--per-method", "{fedrot: 3}"], "per_method must map"),
        (["--methods", "fedavg"], "unknown method 'fedavg'"),
        (["--methods", "fedrot", "--strengths", "2"], "strength must be between"),
        (["--preset", "table99"], "no preset 'table99'.*table1-sst2"),
        (["--config", "nowhere.yaml"], "no file nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, options, message):
    assert main(["compare", *options, "--output", str(tmp_path / "out")]) in (1, 2)
    printed = capsys.readouterr().err
    assert re.search(message, printed) and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_simulations_configuration_is_that_of_a_comparison(tmp_path, capsys):
    SimulationConfig(method="fedit", start="independent", seed=4, clients=3, rounds=1, local_steps=2).save(
        tmp_path / "c.yaml"
    )
    common = ["compare", "--config", str(tmp_path / "c.yaml"), "--batch-size=4"]
    assert main([*common, "--output", str(tmp_path / "one")]) == 0
    assert [p.name for p in (tmp_path / "one").iterdir() if p.is_dir()] == ["independent-fedit-seed4"]
    assert main([*common, "--seeds", "5", "6", "--vary.lr", "1e-2", "--output", str(tmp_path / "two")]) == 0
    assert sorted(p.name for p in (tmp_path / "two").iterdir() if p.is_dir()) == [
        f"independent-fedit-lr=0.01-seed{s}" for s in (5, 6)
    ]
    for folder in ("one/independent-fedit-seed4", "two/independent-fedit-lr=0.01-seed5"):
        config = yaml.safe_load((tmp_path / folder / "config.yaml").read_text())
        assert (config["clients"], config["rounds"], config["batch_size"]) == (3, 1, 4)
