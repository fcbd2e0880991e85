"""The commands as typed, with what they print and leave, and what bad input leaves behind: nothing."""

import json
import re
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import fedrot
from fedrot.cli.commands import main
from fedrot.options import OF_UNEQUAL_RANKS

from .adapters import assert_equal, assert_written, base_model

WHOLE_ROUNDS = ("robust", "byzantine", "clip", *OF_UNEQUAL_RANKS)


def test_methods_lists_ablations_last_and_apart(capsys):
    assert main(["methods"]) == 0
    table, notes = capsys.readouterr().out.split("\n\n")
    named = [line.split()[0] for line in table.splitlines()]
    assert named == ["method", *(name for name, method in fedrot.METHODS.items() if not method.ablation)]
    assert notes.endswith("Ablations of the paper, for comparisons only: random-rotation, scalar.\n")


def test_aggregate_writes_what_the_api_returns(folders, tmp_path, capsys):
    output = tmp_path / "out" / "merged"
    options = ["--weights", "1", "2", "3", "--strength", "1", "--align-on", "joint", "--reflections", "--round", "1"]
    assert main(["aggregate", *folders, "--reference", folders[1], "--output", str(output), *options]) == 0
    changed = {"strength": 1, "align_on": "joint", "reflections": True}
    expected = fedrot.aggregate(folders, [1, 2, 3], folders[1], round=1, **changed)
    assert_written(output, expected)
    PeftModel.from_pretrained(base_model(), str(output))
    record = json.loads((output / "aggregation.json").read_text())
    given = {"folders": folders, "weights": [1, 2, 3], "reference": folders[1], "round": 1}
    assert record["options"] == fedrot.AggregationOptions(**changed).as_dict() | given
    assert record["relative_error"] == expected.report.relative_error
    printed = capsys.readouterr().out
    assert str(expected.report) in printed and str(output) in printed


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--strength", "1"], {"strength": 1}),
        (["--method", "fedrot-consensus", "--align-on", "B"], {"method": "fedrot-consensus", "align_on": "B"}),
        (["--method", "fedrot-least-error", "--reflections"], {"method": "fedrot-least-error", "reflections": True}),
        (["--method", "fedrot-adaptive", "--backend", "torch"], {"method": "fedrot-adaptive", "backend": "torch"}),
        (["--method", "random-rotation", "--seed", "3"], {"method": "random-rotation", "seed": 3}),
    ],
)
def test_inspect_shows_both_errors(folders, capsys, arguments, options):
    assert main(["inspect", *folders, *arguments]) == 0
    plain, rotated = capsys.readouterr().out.split("rotated, then averaged\n")
    assert str(fedrot.aggregate(folders, strength=0, report_error=True).report) in plain
    assert str(fedrot.aggregate(folders, report_error=True, **options).report) in rotated


def test_a_method_that_does_not_rotate_is_not_inspected(folders, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *folders, "--method", "flora"])
    assert stopped.value.code == 2
    assert "fedrot-consensus" in capsys.readouterr().err


def test_why_no_client_was_rotated(folders, capsys):
    fresh = folders[0] + "-fresh"  # B is zero, as PEFT makes it
    get_peft_model(base_model(), LoraConfig(r=2, target_modules=["0", "2"])).save_pretrained(fresh)
    said = "no client was rotated: the reference is untrained"
    for command, arguments, expected in (
        ("inspect", [], True),
        ("inspect", ["--method", "fedrot-adaptive"], True),
        ("inspect", ["--round", "1"], True),
        ("inspect", ["--align-on", "A"], True),
        ("inspect", ["--strength", "0"], False),
        ("aggregate", [], True),
        ("aggregate", ["--method", "flexlora"], False),
    ):
        output = [] if command == "inspect" else ["--output", f"{fresh}-{len(arguments)}"]
        assert main([command, *folders, "--reference", fresh, *arguments, *output]) == 0
        assert (said in capsys.readouterr().out) == expected, (command, arguments)


@pytest.mark.parametrize("method", [name for name in fedrot.METHODS if name != "fedrot"])
def test_every_method_writes_what_the_api_returns(folders, tmp_path, capsys, method):
    output = tmp_path / "merged"
    # Where clients freeze a factor, they must agree on it.
    clients = folders[:1] * 2 if method in ("ffa-lora", "fedsvd", "rolora") else folders
    assert main(["aggregate", *clients, "--method", method, "--output", str(output)]) == 0
    expected = fedrot.aggregate(clients, method=method)
    printed = capsys.readouterr().out
    assert str(expected.report) in printed and f"written to {output}" in printed
    if expected.base_update is not None:
        assert_written(output / "adapter", expected)
        assert "merge base_update into the base model" in printed
        PeftModel.from_pretrained(base_model(), str(output / "base_update"))
    elif expected.personal:
        assert sorted(path.name for path in output.iterdir()) == ["client0", "client1", "client2"]
        own, _ = fedrot.read_adapter(folders[2])
        written, _ = fedrot.read_adapter(output / "client2")
        assert_equal(written, own | expected.state_dict)
    else:
        assert_written(output, expected)


def test_options_of_the_aggregation_reach_it(folders, tmp_path, capsys):
    options = ["--no-report-error", "--no-reflections", "--on-invalid", "drop", "--backend", "torch", "--seed", "3"]
    spoiled, config = fedrot.read_adapter(folders[0])
    fedrot.write_adapter(tmp_path / "nan", {key: x * torch.nan for key, x in spoiled.items()}, config)
    assert main(["aggregate", *folders, str(tmp_path / "nan"), *options, "--output", str(tmp_path / "merged")]) == 0
    assert_written(tmp_path / "merged", fedrot.aggregate(folders, backend="torch"))
    record = json.loads((tmp_path / "merged/aggregation.json").read_text())
    changed = {"report_error": False, "on_invalid": "drop", "backend": "torch", "seed": 3}
    assert record["options"].items() >= fedrot.AggregationOptions(**changed).as_dict().items()
    assert record["error"] is None and "dropped client 3" in capsys.readouterr().out


def test_aggregate_and_inspect_show_every_option(capsys):
    for command in ("aggregate", "inspect"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        left_out = set() if command == "aggregate" else {"on_invalid", "report_error", *WHOLE_ROUNDS}
        for f in fields(fedrot.AggregationOptions):
            assert (f"--{f.name.replace('_', '-')}" in printed) == (f.name not in left_out)
        assert "--group" not in printed and "--previous" not in printed


@pytest.mark.parametrize("command", ["aggregate", "inspect"])
@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        (["--group", "O"], "reflections=True"),
        (["--group", "SO"], "nothing: rotations are the default"),
        (["--group", "GL"], 'method="flexlora"'),
        (["--previous", "before"], 'reference=, with method="fedrot-consensus"'),
        (["--reference", "consensus"], 'method="fedrot-consensus"'),
        (["--strength", "auto"], 'method="fedrot-adaptive"'),
        (["--align-on", "error"], 'method="fedrot-least-error"'),
    ],
)
def test_old_spellings_are_refused_by_the_new_ones(folders, tmp_path, capsys, command, arguments, instead):
    output = ["--output", str(tmp_path / "merged")] if command == "aggregate" else []
    assert main([command, *folders, *arguments, *output]) == 1
    printed = capsys.readouterr().err
    assert f"fedrot 0.1; write {instead}" in printed and printed.count("\n") == 1
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [(["--method", "fedrot"], 'method="fedrot-least-error"'), (["--group", "O"], "reflections=True")],
)
def test_old_spellings_of_merge_are_refused_by_the_new_ones(folders, tmp_path, capsys, arguments, instead):
    assert main(["merge", *folders, *arguments, "--output", str(tmp_path / "merged")]) == 1
    assert f"fedrot 0.1; write {instead}" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_reference_may_be_called_as_an_old_word(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("global", "consensus"):
        (tmp_path / name).symlink_to(folders[1])
        assert main(["aggregate", *folders, "--reference", name, "--output", f"merged-{name}"]) == 0
        assert_written(tmp_path / f"merged-{name}", fedrot.aggregate(folders, reference=folders[1]))


@pytest.mark.parametrize("method", ["flexlora", "fedrot-least-error"])
def test_merge_writes_what_the_api_returns(folders, tmp_path, capsys, method):
    options = ["--method", method, "--rank", "3", "--alpha", "6", "--weights", "1", "2", "3", "--reflections"]
    assert main(["merge", *folders, *options, "--output", str(tmp_path / "merged")]) == 0
    expected = fedrot.merge(folders, [1, 2, 3], rank=3, alpha=6, method=method, reflections=True)
    assert_written(tmp_path / "merged", expected)
    record = json.loads((tmp_path / "merged/aggregation.json").read_text())["options"]
    given = {"folders": folders, "weights": [1, 2, 3], "rank": 3, "alpha": 6, "method": method, "reflections": True}
    assert record.items() >= given.items()
    assert str(expected.report) in capsys.readouterr().out


def test_merge_takes_flexlora_by_default(folders, tmp_path):
    assert main(["merge", *folders, "--output", str(tmp_path / "merged")]) == 0
    assert_written(tmp_path / "merged", fedrot.merge(folders, method="flexlora"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--weights", "1", "2"], "2 weights for 3 updates"),
        (["--weights", "1", "nan", "1"], "client 1 .* has weight nan"),
        (["--strength", "1.5"], "strength must be between 0"),
        (["--strength", "much"], "strength must be between 0 .* got 'much'"),
        (["--align-on", "C"], "align_on must be one of alternate, A, B, joint, got 'C'"),
        (["--on-invalid", "ignore"], "on_invalid must be one of raise, drop, got 'ignore'"),
        (["--round", "-1"], "round must be a whole number from 0, got -1"),
        (["--round", "first"], "round must be a whole number from 0, got 'first'"),
        (["--seed", "1.5"], "seed must be a whole number from 0, got '1.5'"),
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
    "arguments",
    [
        [],
        ["nothing"],
        ["aggregate"],
        ["aggregate", "a", "--output", "b", "--method", "none"],
        ["merge", "a", "--output", "b", "--method", "none"],
        ["methods", "all"],
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
