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

VARIANTS = {"least error": {"align_on": "error"}, "O": {"group": "O", "strength": 1}}


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
    assert (least.config.method, least.config.align_on, least.config.group) == ("fedrot", "error", "SO")
    assert (reflected.config.align_on, reflected.config.group, reflected.config.strength) == ("alternate", "O", 1.0)
    alone, _ = runs(methods=[], variants={"none": {}, "whole": {"strength": "1"}})  # λ is what it is by default
    assert [(run.name, run.config.strength) for run in alone] == [("shared-none-seed7", 0.5), ("shared-whole-seed7", 1.0)]


def test_a_variant_is_run_for_every_start_seed_and_value_that_plays_a_part():
    found, notes = runs(
        methods=[],
        starts=["shared", "independent"],
        seeds=[0, 1],
        vary={"clients": [3, 5], "group": ["SO", "O"]},
        variants={"both": {"align_on": "joint"}, "frozen A": {"method": "ffa-lora"}},
    )
    values = [f"clients={n}-group={group}-seed{seed}" for n in (3, 5) for group in ("SO", "O") for seed in (0, 1)]
    assert {run.name for run in found} == {
        *(f"{start}-both-{value}" for start in ("shared", "independent") for value in values),
        *(f"shared-frozen_A-clients={n}-seed{seed}" for n in (3, 5) for seed in (0, 1)),
    }
    assert notes == ["frozen A was not run from an independent start: its clients must begin with one adapter"]
    both = [run for run in found if run.columns["method"] == "both"]
    assert {(run.config.clients, run.config.group) for run in both} == {(n, g) for n in (3, 5) for g in ("SO", "O")}
    # Which reference is taken plays no part in an average.
    averaged, _ = runs(methods=["fedit"], vary={"reference": ["global", "consensus"]})
    assert [run.name for run in averaged] == ["shared-fedit-seed7"]


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
        ({"fedit": {"group": "O"}}, "'fedit' cannot be told from the method fedit"),
        ({"fedrot-0.5": {}}, "'fedrot-0.5' cannot be told from the method fedrot"),
        ({"fedrot λ=1": {}}, "'fedrot λ=1' cannot be told from the method fedrot"),
        ({"a b": {}, "a_b": {}}, "'a_b' cannot be told from the variant 'a b'"),
        ({"a": {"alignon": "A"}}, "no field 'alignon'"),
        ({"a": {"group": "U"}}, "group.*U"),
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
    argv = ["--variants.least-error.align-on", "error", "--variants.O", "{group: O}", "--variants.O.lora.r=3", "--lr", "1"]
    layer, rest, _ = split_options(argv)
    assert layer == {"variants": {"least-error": {"align_on": "error"}, "O": {"group": "O", "lora.r": 3}}}
    assert rest == ["--lr", "1"]
    over = overlay({"variants": {"O": {"group": "O", "lr": 2}}}, {"lr": 3, "variants": {"O": {"lr": 4}, "x": {}}})
    assert over == {"lr": 3, "variants": {"O": {"group": "O", "lr": 4}, "x": {}}}
    with pytest.raises(ValueError, match="variants must map names"):
        overlay({}, {"variants": {"O": "group"}})


def test_finished_runs_of_methods_are_taken_into_a_comparison_with_variants(tmp_path, capsys):
    short = ["--rounds=1", "--local-steps=1", "--clients=3", "--batch-size=4"]
    short += ["--starts=shared", "--seeds=0", "--methods=fedit"]
    old, new = tmp_path / "old", tmp_path / "new"
    assert main(["compare", *short, "--output", str(old)]) == 0
    assert main(["compare", *short, "--variants.of-O.group", "O", "--variants.A.align-on=A", "--output", str(new)]) == 0
    made = {path.name for path in new.iterdir() if path.is_dir()}
    assert made == {"shared-fedit-seed0", "shared-of-O-seed0", "shared-A-seed0"}
    rows, table = pd.read_csv(new / "results.csv"), (new / "table.txt").read_text()
    assert list(rows["method"]) == ["fedit", "of-O", "A"] and rows["strength"].isna().all()
    assert list(dict.fromkeys(re.findall(r"fedit|of-O|A ", table))) == ["fedit", "of-O", "A "] and "λ" not in table

    # The old run, of a version that had no field reference, in place of the new one.
    shutil.rmtree(new / "shared-fedit-seed0")
    shutil.copytree(old / "shared-fedit-seed0", new / "shared-fedit-seed0")
    saved = new / "shared-fedit-seed0/config.yaml"
    config = yaml.safe_load(saved.read_text())
    assert config.pop("reference") == "global"
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
         "accuracy": (r + 1) / 100 + seed if r != 2 else np.nan, "relative_error": 0.5}
        for method, strength in (("fedrot", 0.5), ("auto", np.nan)) for seed in (0, 1) for r in range(12)
    )  # fmt: skip
    text = as_markdown(rounds_tables(rows, []), [])
    numbers = [1, 2, 5, 10, 12]  # the third was not evaluated, the last always is shown
    assert text.startswith(
        "accuracy by round\n\n| start | method | 1 | 2 | 5 | 10 | 12 |\n| --- | --- | --- | --- | --- | --- | --- |\n"
        "| shared | fedrot λ=0.5 | " + " | ".join(f"{n / 100 + 0.5:.3f} ± 0.707" for n in numbers) + " |\n| shared | auto |"
    )
    assert "relative error by round" in text and text.count("0.500 ± 0.000") == 2 * len(numbers)


@pytest.mark.parametrize(("name", "rows"), [("beyond-digits", 8), ("beyond-text", 6)])
def test_the_presets_beside_the_papers(name, rows):
    options = load_preset(name) | ({"model": "encoder", "dataset": "train.tsv"} if name == "beyond-text" else {})
    found, notes = Comparison.of(options).runs()
    assert len(found) == 2 * 3 * (2 * rows + 1) and len(notes) == 1  # RoLoRA only from a shared start
    assert {run.config.clients for run in found} == {10, 50}
    by = {run.columns["method"]: run.config for run in found}
    assert by["consensus"].reference == "consensus" and by["auto"].strength == "auto"
    assert by["least error"].align_on == by["GL"].align_on == "error" and by["GL"].group == "GL"
    assert all(config.eval_every == 1 and not config.geometry for config in by.values())
