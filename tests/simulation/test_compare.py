"""``fedrot compare``: what varies, what is refused before anything is run, and what tables and presets say."""

import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest
import yaml

from fedrot.cli.commands import main
from fedrot.methods.registry import METHODS
from fedrot.simulation import SimulationConfig
from fedrot.simulation.parser import make_parser
from fedrot.simulation.sweep.comparison import Comparison
from fedrot.simulation.sweep.layers import overlay, split_options, without
from fedrot.simulation.sweep.shared_tasks import NOT_OF_THE_TASK, by_task, task_fields
from fedrot.simulation.sweep.tables import as_markdown, comparison_tables

SHORT = ["--rounds=1", "--local-steps=2", "--clients=3", "--batch-size=4"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cell(values):
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def names(**options):
    return [run.name for run in Comparison(**options).runs()[0]]


def test_what_is_compared_unless_told_otherwise():
    args = make_parser("compare").parse_args([])
    assert args.methods == ["fedit", "fedrot"]
    assert names(methods=args.methods, strengths=args.strengths, starts=args.starts, seeds=args.seeds) == names() == [
        f"{start}-{method}-seed{seed}"
        for start in ("shared", "independent")
        for method, seed in [("fedit", 0), ("fedit", 1), ("fedit", 2)]
        + [(f"fedrot-{strength}", seed) for seed in range(3) for strength in ("0.5", "1")]
    ]  # fmt: skip


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


def test_a_run_of_every_value_with_what_is_the_methods_own():
    runs, _ = Comparison(
        {"rounds": 3, "lora": {"r": 4, "lora_alpha": 8}},
        methods=["fedit", "fedrot"],
        strengths=[1],
        starts=["shared"],
        seeds=[7],
        vary={"clients": [3, 5], "align_on": ["A", "joint"]},
        per_method={"fedrot": {"lr": 1, "lora.lora_alpha": 2}},
    ).runs()
    assert [run.name for run in runs] == [
        f"shared-{name}-seed7"
        for n in (3, 5)
        # Which factor is aligned plays no part in a plain average: once is enough.
        for name in (f"fedit-clients={n}", f"fedrot-1-clients={n}-align_on=A", f"fedrot-1-clients={n}-align_on=joint")
    ]
    assert [run.config.clients for run in runs] == [3, 3, 3, 5, 5, 5]
    assert [run.config.align_on for run in runs] == ["alternate", "A", "joint"] * 2
    assert [run.config.lr for run in runs] == [0.01, 1.0, 1.0] * 2
    assert [run.config.lora["lora_alpha"] for run in runs] == [8, 2, 2] * 2
    assert all((run.config.rounds, run.config.seed, run.config.lora["r"]) == (3, 7, 4) for run in runs)


def test_a_method_has_its_own_values_of_what_is_varied():
    runs, _ = Comparison(
        methods=["fedit", "rolora"],
        starts=["shared"],
        seeds=[7],
        vary={"clients": [3, 5], "lr": [0.005, 0.02]},
        per_method={"rolora": {"lr": ["5e-4", 0.001]}, "fedrot": {"momentum": 0.5}},
        variants={"in turn": {"method": "rolora", "momentum": 0.25}, "O": {"reflections": True}},
    ).runs()
    found = {run.name: run.config for run in runs}
    rates = {"fedit": (0.005, 0.02), "rolora": (0.0005, 0.001), "in_turn": (0.0005, 0.001), "O": (0.005, 0.02)}
    assert {name: (c.clients, c.lr) for name, c in found.items()} == {
        f"shared-{name}-clients={n}-lr={rate}-seed7": (n, rate)
        for name, some in rates.items()
        for n in (3, 5)
        for rate in some
    }
    assert {run.columns["lr"] for run in runs if run.columns["method"] == "rolora"} == {0.0005, 0.001}
    assert {config.momentum for name, config in found.items() if "in_turn" in name} == {0.25}


def test_alpha_follows_the_rank_by_a_scaling():
    runs, _ = Comparison({"lora_scaling": "2"}, methods=["fedit"], starts=["shared"], vary={"lora.r": [2, 24]}).runs()
    assert {(run.config.lora["r"], run.config.lora["lora_alpha"]) for run in runs} == {(2, 4), (24, 48)}
    assert {frozenset(run.columns) for run in runs} == {frozenset({"start", "method", "seed", "strength", "lora.r"})}
    config = SimulationConfig(lora={"target_modules": ["q_proj"]}, lora_scaling=0.5)
    assert config.lora == {"target_modules": ["q_proj"], "lora_alpha": 4.0}  # PEFT's rank is 8
    assert SimulationConfig(**dataclasses.asdict(config)) == config
    given = {"lora": {"r": 4}, "lora_scaling": 2.0}
    assert without(given, ["lora.lora_alpha"]) == {"lora": {"r": 4}} and without(given, ["lora.r"])["lora_scaling"] == 2.0
    own = {"lora": {"r": 4, "lora_alpha": 16}}
    assert overlay(given, own) == own and overlay(given, own | {"lora_scaling": 3.0}) == own | {"lora_scaling": 3.0}
    with pytest.raises(ValueError, match=r"lora\.r must be a whole number, got 'x'"):
        SimulationConfig(lora={"r": "x"}, lora_scaling=2)


@pytest.mark.parametrize(
    ("method", "vary", "per_value", "strengths"),
    [
        ("fedit", {"align_on": ["A", "joint"], "reflections": [False, True]}, 1, {None}),
        ("fedrot", {"align_on": ["A", "joint"], "reflections": [False, True]}, 4, {0.5, 1.0}),
        ("fedrot-consensus", {"align_on": ["A", "joint"]}, 2, {0.5, 1.0}),
        ("fedrot-least-error", {"align_on": ["A", "joint"]}, 1, {0.5, 1.0}),
        ("fedrot-adaptive", {"align_on": ["A", "joint"]}, 2, {None}),
        ("random-rotation", {"align_on": ["A", "joint"], "reflections": [False, True]}, 2, {0.5, 1.0}),
        ("scalar", {"align_on": ["A", "joint"], "reflections": [False, True]}, 2, {None}),
        ("flora", {"clients": [3, 5], "reflections": [False, True]}, 2, {None}),
    ],
)
def test_a_method_is_run_once_for_options_that_it_does_not_use(method, vary, per_value, strengths):
    runs, _ = Comparison(methods=[method], strengths=[0.5, 1.0], starts=["shared"], seeds=[0], vary=vary).runs()
    assert len(runs) == per_value * len(strengths) and {run.config.strength for run in runs} == strengths
    used = {name for name in vary if name in METHODS[method].uses | {"clients"}}
    assert {frozenset(run.columns) - {"start", "method", "seed", "strength"} for run in runs} == {frozenset(used)}


def test_the_table_of_one_field_repeats_methods_in_which_it_plays_no_part():
    values = [("fedit", np.nan, None, 0.5, 0.3), ("fedrot", 1.0, "A", 0.6, 0.2), ("fedrot", 1.0, "B", 0.7, 0.1)]
    columns = ["method", "strength", "align_on", "accuracy", "relative_error", "seed", "round"]
    rows = pd.DataFrame([(*v, seed, r) for v in values for seed in (0, 1) for r in (1, 2)], columns=columns)
    rows = rows.assign(start="shared")
    rows.loc[rows["round"] == 1, ["accuracy", "relative_error"]] = 9.0  # of no account for the last round
    tables = comparison_tables(rows, ["align_on"])
    assert as_markdown(tables, ["a note"]) == (
        "accuracy after the last round, by align_on\n\n"
        "| start | method | A | B |\n| --- | --- | --- | --- |\n"
        "| shared | fedit | 0.500 ± 0.000 | 0.500 ± 0.000 |\n"
        "| shared | fedrot λ=1 | 0.600 ± 0.000 | 0.700 ± 0.000 |\n\n"
        "relative error after the last round, by align_on\n\n"
        "| start | method | A | B |\n| --- | --- | --- | --- |\n"
        "| shared | fedit | 0.300 ± 0.000 | 0.300 ± 0.000 |\n"
        "| shared | fedrot λ=1 | 0.200 ± 0.000 | 0.100 ± 0.000 |\n\n"
        "accuracy in each run's best round (the largest of all rounds on the test data, which overestimates it), by align_on"
        "\n\n| start | method | A | B |\n| --- | --- | --- | --- |\n"
        "| shared | fedit | 9.000 ± 0.000 | 9.000 ± 0.000 |\n"
        "| shared | fedrot λ=1 | 9.000 ± 0.000 | 9.000 ± 0.000 |\n\n"
        "a note"
    )


def test_several_fields_are_rows_and_rounds_that_were_not_evaluated_do_not_count():
    rows = pd.DataFrame(
        {"start": "shared", "method": "fedit", "strength": np.nan, "seed": 0, "clients": n, "lr": lr, "round": r,
         "loss": n * lr + r if r != 2 else np.nan, "relative_error": 0.0}
        for n in (3, 10) for lr in (0.5, 1.0) for r in (1, 2, 3)
    )  # fmt: skip
    table, best = comparison_tables(rows, ["clients", "lr"]).values()
    assert best.loc[("shared", "fedit", 10, 0.5)].to_list() == ["6.000"]  # the smallest loss is that of round 1
    assert list(table.columns) == [f"{m}, round {r}" for m in ("loss", "relative error") for r in (1, 3)]
    assert table.loc[("shared", "fedit", 10, 0.5)].to_list() == ["6.000", "8.000", "0.000", "0.000"]
    assert len(table) == 4


def test_the_best_round_is_each_runs_own():
    scores = {0: [0.1, 0.9, 0.4], 1: [0.2, 0.3, 0.7], 2: [0.5, np.nan, 0.1]}
    rows = pd.DataFrame(
        {"start": "shared", "method": method, "strength": np.nan, "seed": seed, "round": r, "accuracy": better + x,
         "loss": 9 - r, "relative_error": 0.0}
        for method, better in (("fedit", 0), ("own", 1)) for seed, some in scores.items() for r, x in enumerate(some, 1)
    )  # fmt: skip
    last, best = comparison_tables(rows, []).items()
    assert last[1].loc[("shared", "fedit"), "accuracy, round 3"] == cell([0.4, 0.7, 0.1])
    assert best[0].startswith("accuracy in each run's best round") and "test data, which overestimates it" in best[0]
    assert best[1]["accuracy"].to_list() == [cell([0.9, 0.7, 0.5]), cell([1.9, 1.7, 1.5])]
    (*_, (title, best)) = comparison_tables(rows.drop(columns="accuracy"), []).items()
    assert "the smallest of all rounds on the test data, which underestimates it" in title
    assert best["loss"].to_list() == [cell([6, 6, 6])] * 2
    assert len(comparison_tables(rows[rows["round"] == 3], [])) == 1, "one round is the last and the best"


def test_a_method_without_some_of_the_values_has_dashes():
    rows = pd.DataFrame(
        {"start": "shared", "method": method, "strength": np.nan, "seed": 0, "round": 1, "lr": lr, "accuracy": lr,
         "relative_error": 0.0}
        for method, rates in (("fedit", (0.5, 1.0)), ("rolora", (0.25, 0.5))) for lr in rates
    )  # fmt: skip
    accuracy, _ = comparison_tables(rows, ["lr"]).values()
    assert accuracy.loc[("shared", "fedit")].to_dict() == {0.25: "–", 0.5: "0.500", 1.0: "1.000"}
    assert accuracy.loc[("shared", "rolora")].to_dict() == {0.25: "0.250", 0.5: "0.500", 1.0: "–"}


def test_errors_that_no_run_measured_are_in_no_table(tmp_path, capsys):
    output = tmp_path / "out"
    varied = ["--methods", "fedit", "fedrot-consensus", "--strengths=1", "--starts=shared", "--seeds", "0", "1"]
    assert main(["compare", *varied, *SHORT, "--report-error=false", "--output", str(output)]) == 0
    assert pd.read_csv(output / "results.csv")["relative_error"].isna().all()
    header = (output / "table.md").read_text().splitlines()[0]
    assert header == "| start | method | accuracy, round 1 |"
    assert "relative error" not in capsys.readouterr().out + (output / "rounds.md").read_text()


def test_an_error_that_some_run_did_not_measure_is_a_dash():
    rows = pd.DataFrame(
        {
            "start": "shared",
            "method": method,
            "strength": np.nan,
            "seed": 0,
            "round": 1,
            "accuracy": 0.5,
            "relative_error": x,
        }
        for method, x in (("fedit", 0.25), ("fedrot", None))
    )
    (table,) = comparison_tables(rows, []).values()
    assert table["relative error, round 1"].to_list() == ["0.250", "–"]


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


def test_all_methods():
    runs, notes = Comparison(methods=list(METHODS), seeds=[0], strengths=[0.5]).runs()
    needing = [name for name, kind in METHODS.items() if kind.needs_shared_start]
    assert len(runs) == 2 * len(METHODS) - len(needing)
    assert [note.split()[0] for note in notes] == needing


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


def test_what_is_said_later_replaces_what_was_said_before():
    lower = {"clients": 3, "lr": 1, "vary": {"lora.r": [2, 4]}, "per_method": {"rolora": {"lr": 2, "momentum": 3}}}
    assert overlay(lower, {"vary": {"clients": [5, 6]}}) == {
        "lr": 1,
        "vary": {"lora.r": [2, 4], "clients": [5, 6]},
        "per_method": {"rolora": {"lr": 2, "momentum": 3}},
    }
    assert overlay(lower, {"lr": 9, "lora": {"r": 8}}) == {
        "clients": 3,
        "lr": 9,
        "lora": {"r": 8},
        "per_method": {"rolora": {"momentum": 3}},
    }
    assert overlay(lower, {"per_method": {"rolora": {"lr": 5}}})["per_method"] == {"rolora": {"lr": 5, "momentum": 3}}
    assert without({"lora": {"r": 4, "lora_alpha": 8}, "vary": {"lora.r": [2]}}, ["lora.r"]) == {"lora": {"lora_alpha": 8}}
    assert overlay({"seeds": [1, 2]}, {"seed": 3}) == {"seeds": [3]}
    assert overlay({}, {"seed": 3, "seeds": [4, 5]}) == {"seeds": [4, 5]}
    assert overlay({"strengths": [0.5]}, {"strength": None, "method": "fedit"}) == {"strengths": [0.5], "methods": ["fedit"]}
    with pytest.raises(ValueError, match="clients is both set and varied"):
        overlay({}, {"clients": 3, "vary": {"clients": [3, 4]}})


def test_options_of_the_command_line():
    argv = ["--preset", "p", "--vary.lora.r", "2", "4", "--vary.lr=[1e-3,2]", "--per_method.ffa_lora.lr", "0.5"]
    argv += ["--seeds", "1", "2", "--lora.r", "3"]
    assert split_options(argv) == (
        {"preset": "p", "vary": {"lora.r": [2, 4], "lr": [0.001, 2]}, "per_method": {"ffa-lora": {"lr": 0.5}}},
        ["--seeds", "1", "2", "--lora.r", "3"],
        ["seeds", "lora.r"],
    )


def test_runs_share_data_and_model_where_they_can():
    fields = {f.name for f in dataclasses.fields(SimulationConfig)}
    assert fields >= NOT_OF_THE_TASK
    assert not NOT_OF_THE_TASK & {
        "model",
        "dataset",
        "max_length",
        "max_train_examples",
        "test_fraction",
        "partition_column",
    }
    runs, _ = Comparison(methods=["fedit"], vary={"clients": [3, 5], "max_length": [8, 9]}, seeds=[0]).runs()
    ordered = by_task(runs)
    assert [run.config.max_length for run in ordered] == [8, 8, 8, 8, 9, 9, 9, 9]
    assert len({task_fields(run.config) for run in ordered}) == 2
    assert sorted(run.name for run in ordered) == sorted(run.name for run in runs)
