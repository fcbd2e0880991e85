"""The presets of comparisons: the paper's tables as written and as released, their reductions, and options over them."""

import dataclasses
import functools
import re
from importlib import resources

import pytest
import yaml

from fedrot.cli.commands import main
from fedrot.methods.registry import METHODS
from fedrot.simulation.sweep import presets
from fedrot.simulation.sweep.comparison import Comparison
from fedrot.simulation.sweep.layers import overlay, split_options
from fedrot.simulation.sweep.presets import describe_presets, load_preset


def options_of(name):
    """A preset's options, with those that its users must give."""
    options = load_preset(name)
    if name.startswith(("text-", "beyond-text", "plateau-")):
        options |= {"model": "encoder", "dataset": "train.tsv"}
    if name == "table5-code":
        options["execute_generated_code"] = True
    return options


@functools.cache
def runs_and_notes(name):
    """What a preset compares, which several tests look at and takes as long as a short run."""
    return Comparison.of(options_of(name)).runs()


@pytest.mark.parametrize("name", describe_presets())
def test_every_preset_is_runs(name):
    options, (runs, notes) = options_of(name), runs_and_notes(name)
    assert len({run.config.seed for run in runs}) == 3
    variants = {own.get("method", "fedrot") for own in options.get("variants", {}).values()}
    assert {run.config.method for run in runs} == set(options["methods"]) | variants
    frozen = [method for method in options["methods"] if METHODS[method].needs_shared_start]
    assert [note.split()[0] for note in notes] == (frozen if "independent" in options["starts"] else [])


def test_presets_follow_the_paper():
    def configs(name):
        return [run.config for run in runs_and_notes(name)[0]]

    table1 = configs("table1-qnli")
    assert len(table1) == 5 * 3 * 3
    assert {c.clients for c in table1} == {3, 10, 50}
    for c in table1:
        assert (c.model, c.dataset, c.lora["r"], c.lora["lora_alpha"]) == ("FacebookAI/roberta-large", "qnli", 4, 8)
        assert (c.rounds, c.local_steps, c.batch_size, c.optimizer, c.max_length) == (250, 20, 128, "sgd", 128)
        assert c.lr == (0.001 if c.method == "rolora" else 0.02)
        assert (c.client_weights, c.dtype, c.strength) == ("examples", "float32", 0.5 if c.method == "fedrot" else None)
    ranks = {(c.lora["r"], c.lora["lora_alpha"]) for c in configs("table3-mnli")}
    assert ranks == {(r, 2 * r) for r in (2, 4, 8, 16, 24)}
    assert {c.dirichlet_alpha for c in configs("table4-mnli")} == {100, 1, 0.5}
    assert {c.strength for c in configs("figure8-sst2")} == {0, 0.2, 0.4, 0.6, 0.8, 1}
    gsm8k = configs("table5-gsm8k")
    assert {(c.clients, c.rounds, c.local_steps, c.batch_size, c.max_length) for c in gsm8k} == {(3, 100, 30, 1, 650)}


def test_presets_of_the_plateau():
    (sst2, _), (pairs, _) = map(runs_and_notes, ("plateau-sst2", "plateau-pairs"))
    methods = {"fedit", "fedrot", "ffa-lora", "rolora", "fedrot O hard"}
    places = {(dtype, n) for dtype in ("float32", "float16") for n in (10, 50)}
    for runs, found, length in ((sst2, places, 16), (pairs, {("float32", 10)}, 40)):
        assert {(r.columns["method"], r.config.seed, r.config.dtype, r.config.clients) for r in runs} == {
            (method, seed, *place) for method in methods for seed in (11, 12, 13) for place in found
        }
        assert len(runs) == 15 * len(found) and {r.config.max_length for r in runs} == {length}
        for c in (run.config for run in runs):
            assert (c.rounds, c.local_steps, c.batch_size, c.optimizer, c.lr) == (100, 20, 2, "sgd", 0.2)
            assert (c.client_weights, c.eval_every, c.max_test_examples, c.start) == ("equal", 1, 300, "shared")
            assert (c.lora["r"], c.lora["lora_alpha"], c.lora["lora_dropout"]) == (4, 8, 0.05)
            assert c.lora["target_modules"] == ["query", "value"] and (c.partition, c.dirichlet_alpha) == ("dirichlet", 0.5)
    hard = [run.config for run in (*sst2, *pairs) if run.columns["method"] == "fedrot O hard"]
    assert {(c.method, c.reflections, c.strength) for c in hard} == {("fedrot", True, 1.0)}
    assert {(r.config.text_column, r.config.text_pair_column, r.config.label_column) for r in pairs} == {
        ("first", "second", "label")
    }


RELEASED = [name for name in describe_presets() if name.startswith("released-")]


@pytest.mark.parametrize("name", RELEASED)
def test_presets_follow_the_released_scripts_beside_the_paper(name):
    (written, _), (released, _) = map(runs_and_notes, (name.removeprefix("released-"), name))
    hard = [run for run in released if run.columns["method"] == "fedrot O hard"]
    others = [run for run in released if run not in hard]
    own = {"client_weights": "equal", "dtype": "float16", "eval_every": 1, "rounds": 500 if name.endswith("rte") else 250}
    for run in released:
        assert {field: getattr(run.config, field) for field in own} == own
    shift = {0: 11, 1: 12, 2: 13}
    expected = [dataclasses.replace(run.config, seed=shift[run.config.seed], **own) for run in written]
    assert [run.config for run in others] == expected, "all else is as the paper writes it"
    soft = [run.config for run in others if run.config.method == "fedrot" and run.config.strength in (0.5, 0.6)]
    assert len(hard) == len(soft) > 0
    for run, other in zip(hard, soft, strict=True):
        assert (run.config.method, run.config.reflections, run.config.strength) == ("fedrot", True, 1.0)
        assert dataclasses.replace(run.config, reflections=False, strength=other.strength) == other and not other.reflections


def test_there_is_a_released_preset_of_every_table_of_language_understanding():
    assert RELEASED == [f"released-{name}" for name in describe_presets() if re.match("table(1|16|3|4)-|figure8", name)]


@pytest.mark.parametrize("name", ["table4-mnli", "released-table4-mnli"])
def test_every_method_is_tuned_over_as_many_rates(name):
    argv = ["--vary.lr", "0.005", "0.02", "--per_method.rolora.lr", "[0.0005, 0.001]", "--vary.dirichlet_alpha", "0.5"]
    layer, _, _ = split_options(argv)
    assert " ".join(argv[:4]).replace("_", "-") in (resources.files(presets) / "_paper.yaml").read_text().replace("'", "")
    runs, _ = Comparison.of(overlay(load_preset(name), layer)).runs()
    rates = {run.columns["method"]: set() for run in runs}
    for run in runs:
        rates[run.columns["method"]].add(run.config.lr)
    assert rates.pop("rolora") == {0.0005, 0.001}
    assert len(rates) >= 4 and all(some == {0.005, 0.02} for some in rates.values())


def test_a_preset_is_overridden_by_options(tmp_path, capsys):
    options = [
        "--preset",
        "reproduce-digits-clients",
        "--methods",
        "fedit",
        "--seeds=0",
        "--lr=0.5",
        "--rounds=1",
        "--local-steps=2",
        "--clients=3",
    ]
    assert main(["compare", *options, "--output", str(tmp_path / "out")]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["shared-fedit-seed0"]
    config = yaml.safe_load((tmp_path / "out/shared-fedit-seed0/config.yaml").read_text())
    assert (config["clients"], config["lr"], config["rounds"]) == (3, 0.5, 1)
    assert config["lora"] == load_preset("reproduce-digits-clients")["lora"]


def test_presets_are_listed_with_a_line_each(capsys):
    assert main(["compare", "--preset", "help"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(describe_presets())
    assert re.search(r"^table1-sst2 +SST-2 by method", printed, re.MULTILINE)
