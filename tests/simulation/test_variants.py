"""Variants of ``fedrot compare``: named settings beside the methods."""

import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from fedrot.cli.commands import main
from fedrot.simulation.sweep.comparison import Comparison
from fedrot.simulation.sweep.layers import overlay, split_options
from fedrot.simulation.sweep.presets import load_preset
from fedrot.simulation.sweep.tables import as_markdown, rounds_tables

VARIANTS = {"least error": {"method": "fedrot-least-error"}, "O": {"reflections": True, "strength": 1}}


def runs(**options):
    return Comparison({"rounds": 3}, **{"starts": ["shared"], "seeds": [7], "strengths": [0.5, 1], **options}).runs()


def test_variants_run_beside_the_methods_once_whatever_the_strengths():
    plain, _ = runs()
    found, _ = runs(variants=VARIANTS)
    assert found[: len(plain)] == plain  # what is run without variants is run as it was
    assert [run.name for run in found] == [
        *("shared-fedit-seed7", "shared-fedrot-0.5-seed7", "shared-fedrot-1-seed7"),
        *("shared-least_error-seed7", "shared-O-seed7"),
    ]
    least, reflected = found[-2:]
    assert (least.columns["method"], reflected.columns["method"]) == ("least error", "O")
    assert math.isnan(least.columns["strength"]) and math.isnan(reflected.columns["strength"])
    assert (least.config.method, least.config.reflections, least.config.strength) == ("fedrot-least-error", False, 1.0)
    assert (reflected.config.method, reflected.config.reflections, reflected.config.strength) == ("fedrot", True, 1.0)
    alone, _ = runs(methods=[], variants={"none": {}, "whole": {"strength": "1"}})  # λ is what it is by default
    assert [(run.name, run.config.strength) for run in alone] == [("shared-none-seed7", 0.5), ("shared-whole-seed7", 1.0)]


def test_a_variant_is_run_for_every_start_seed_and_value_that_plays_a_part():
    found, notes = runs(
        methods=[],
        starts=["shared", "independent"],
        seeds=[0, 1],
        vary={"clients": [3, 5], "reflections": [False, True]},
        variants={"both": {"align_on": "joint"}, "frozen A": {"method": "ffa-lora"}},
    )
    values = [f"clients={n}-reflections={r}-seed{seed}" for n in (3, 5) for r in (False, True) for seed in (0, 1)]
    assert {run.name for run in found} == {
        *(f"{start}-both-{value}" for start in ("shared", "independent") for value in values),
        *(f"shared-frozen_A-clients={n}-seed{seed}" for n in (3, 5) for seed in (0, 1)),
    }
    assert notes == ["frozen A was not run from an independent start: its clients must begin with one adapter"]
    both = [run for run in found if run.columns["method"] == "both"]
    assert {(run.config.clients, run.config.reflections) for run in both} == {(n, r) for n in (3, 5) for r in (False, True)}


def test_a_variant_has_what_is_its_methods_own_and_wins():
    own = {"fedrot": {"lr": 0.5, "momentum": 0.5, "lora.r": 2}, "rolora": {"lr": 0.25}}
    variants = {"a": {"lr": "0.125", "lora.lora_alpha": 3}, "b": {"method": "rolora"}, "c": {"lora": {"r": 5}}}
    a, b, c = (run.config for run in runs(methods=[], per_method=own, variants=variants)[0])
    assert (a.lr, a.momentum, a.lora) == (0.125, 0.5, {"r": 2, "lora_alpha": 3})
    assert (b.method, b.lr, b.momentum, b.lora["r"]) == ("rolora", 0.25, 0.0, 8)
    assert (c.lr, c.lora) == (0.5, {"r": 5})


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"fedit": {"reflections": True}}, "'fedit' cannot be told from the method fedit"),
        ({"fedrot-0.5": {}}, "'fedrot-0.5' cannot be told from the method fedrot"),
        ({"fedrot λ=1": {}}, "'fedrot λ=1' cannot be told from the method fedrot"),
        ({"a b": {}, "a_b": {}}, "'a_b' cannot be told from the variant 'a b'"),
        ({"a": {"alignon": "A"}}, "no field 'alignon'"),
        ({"a": {"reflections": "perhaps"}}, "reflections.*perhaps"),
        ({"a": {"lora.rank": 3}}, "lora: .*rank"),
        ({"a": {"method": "fedavg"}}, "variants.a: unknown method 'fedavg'"),
        ({"a": {"seed": 3}}, "seeds"),
        ({"a": {"start": "shared"}}, "starts"),
        ({"a": {"clients": 3}}, "clients is varied and is set by variant a"),
        ({"a": {"strength": 2}}, "strength must be between"),
        ({"a": 3}, "variants.a must map fields to values, got 3"),
        ({True: {}}, "True is no name"),
        ({"/": {}}, "'/' is no name"),
    ],
)
def test_mistakes_are_found_before_anything_is_run(variants, message):
    with pytest.raises(ValueError, match=message):
        runs(vary={"clients": [4, 5]}, variants=variants)


def test_options_of_the_command_line():
    argv = ["--variants.on-A.align-on", "A", "--variants.O", "{reflections: true}", "--variants.O.lora.r=3", "--lr", "1"]
    layer, rest, _ = split_options(argv)
    assert layer == {"variants": {"on-A": {"align_on": "A"}, "O": {"reflections": True, "lora.r": 3}}}
    assert rest == ["--lr", "1"]
    over = overlay({"variants": {"O": {"reflections": True, "lr": 2}}}, {"lr": 3, "variants": {"O": {"lr": 4}, "x": {}}})
    assert over == {"lr": 3, "variants": {"O": {"reflections": True, "lr": 4}, "x": {}}}
    with pytest.raises(ValueError, match="variants must map names"):
        overlay({}, {"variants": {"O": "reflections"}})


def test_finished_runs_of_methods_are_taken_into_a_comparison_with_variants(tmp_path, capsys):
    short = ["--rounds=1", "--local-steps=1", "--clients=3", "--batch-size=4"]
    short += ["--starts=shared", "--seeds=0", "--methods=fedit"]
    old, new = tmp_path / "old", tmp_path / "new"
    assert main(["compare", *short, "--output", str(old)]) == 0
    assert (
        main(["compare", *short, "--variants.of-O.reflections", "true", "--variants.A.align-on=A", "--output", str(new)])
        == 0
    )
    made = {path.name for path in new.iterdir() if path.is_dir()}
    assert made == {"shared-fedit-seed0", "shared-of-O-seed0", "shared-A-seed0"}
    rows, table = pd.read_csv(new / "results.csv"), (new / "table.txt").read_text()
    assert list(rows["method"]) == ["fedit", "of-O", "A"] and rows["strength"].isna().all()
    assert list(dict.fromkeys(re.findall(r"fedit|of-O|A ", table))) == ["fedit", "of-O", "A "] and "λ" not in table

    # The old run, of a version that had no field reflections, in place of the new one.
    shutil.rmtree(new / "shared-fedit-seed0")
    shutil.copytree(old / "shared-fedit-seed0", new / "shared-fedit-seed0")
    saved = new / "shared-fedit-seed0/config.yaml"
    config = yaml.safe_load(saved.read_text())
    assert config.pop("reflections") is False
    saved.write_text(yaml.safe_dump(config))
    (new / "results.csv").unlink()
    assert main(["compare", "--resume", str(new)]) == 0
    assert (new / "table.txt").read_text() == table and (new / "rounds.md").exists()
    config["lr"] = 9.0
    saved.write_text(yaml.safe_dump(config))
    assert main(["compare", "--resume", str(new)]) == 1
    assert "was run with another lr;" in capsys.readouterr().err


def test_a_table_by_round():
    rows = pd.DataFrame(
        {"start": "shared", "method": method, "strength": strength, "seed": seed, "round": r,
         "accuracy": r / 100 + seed if r != 3 else np.nan, "relative_error": 0.5}
        for method, strength in (("fedrot", 0.5), ("own", np.nan)) for seed in (0, 1) for r in range(1, 108)
    )  # fmt: skip
    text = as_markdown(rounds_tables(rows, []), [])
    # All of the first ten but the third, which was not evaluated, then 1, 2, 3 and 5 of every power, and the last.
    numbers = [1, 2, 4, 5, 6, 7, 8, 9, 10, 20, 30, 50, 100, 107]
    assert text.startswith(
        f"accuracy by round\n\n| start | method | {' | '.join(map(str, numbers))} |\n"
        f"| {' | '.join(['---'] * (2 + len(numbers)))} |\n"
        "| shared | fedrot λ=0.5 | " + " | ".join(f"{n / 100 + 0.5:.3f} ± 0.707" for n in numbers) + " |\n| shared | own |"
    )
    assert "relative error by round" in text and text.count("0.500 ± 0.000") == 2 * len(numbers)


@pytest.mark.parametrize(("name", "rows"), [("beyond-digits", 7), ("beyond-text", 5)])
def test_the_presets_beside_the_papers(name, rows):
    options = load_preset(name) | ({"model": "encoder", "dataset": "train.tsv"} if name == "beyond-text" else {})
    found, notes = Comparison.of(options).runs()
    assert len(found) == 2 * 3 * (2 * rows + 1) and len(notes) == 1  # RoLoRA only from a shared start
    assert {run.config.clients for run in found} == {10, 50}
    by = {run.columns["method"]: run.config for run in found}
    variants = {name: config for name, config in by.items() if name in options["variants"]}
    assert {name: config.method for name, config in variants.items() if "joint" not in name} == {
        "consensus": "fedrot-consensus",
        "least error": "fedrot-least-error",
        "adaptive": "fedrot-adaptive",
    }
    assert {name: config.strength for name, config in variants.items() if "joint" not in name} == {
        "consensus": 1.0,
        "least error": 1.0,
        "adaptive": None,
    }
    assert all(config.eval_every == 1 and not config.geometry for config in by.values())
