"""The simulator's options: what --help shows, and what fedrot 0.1 called otherwise."""

import dataclasses
import re

import pytest
import yaml

from fedrot.cli.commands import main
from fedrot.methods.registry import METHODS
from fedrot.options import AggregationOptions
from fedrot.simulation import SimulationConfig
from fedrot.simulation.parser import make_parser
from fedrot.simulation.sweep.comparison import Comparison
from fedrot.simulation.sweep.fields import LISTS

FIELDS = [field.name for field in dataclasses.fields(SimulationConfig)]


def helps(command):
    return {action.dest: action.help for action in make_parser(command)._actions}


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_has_a_help_of_whole_sentences(name):
    shown = helps("simulate")[name]
    assert re.match(r"[A-ZΛλ]", shown) and shown.endswith((".", '."')) and not shown.startswith("Of ")
    if name not in LISTS:
        assert helps("compare")[name] == shown


@pytest.mark.parametrize("field", dataclasses.fields(AggregationOptions), ids=lambda field: field.name)
def test_an_options_help_is_what_it_means_everywhere(field):
    shown = helps("simulate")[field.name]
    if field.name == "seed":  # it draws more here
        assert all(word in shown for word in ("partition", "initialisation", "sampling", "dropout"))
    else:
        assert shown == field.metadata["help"].replace("%", "%%")


@pytest.mark.parametrize("name", LISTS.values())
def test_a_comparisons_lists_have_help_too(name):
    assert helps("compare")[name].endswith(".")


@pytest.mark.parametrize("command", ["simulate", "compare"])
def test_the_help_can_be_printed(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert "Allow reflections too, O(r)" in printed and "The number of communication rounds." in printed


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="unknown method 'fedavg'; known methods: fedit, fedrot"):
        SimulationConfig(method="fedavg")


@pytest.mark.parametrize("method", METHODS)
def test_the_strength_is_the_methods_own_where_it_plays_a_part(method):
    own = METHODS[method].default_strength if "strength" in METHODS[method].uses else None
    assert SimulationConfig(method=method).strength == own
    given = SimulationConfig(method=method, strength=0.25).strength
    assert given == (None if own is None else 0.25)


OLD = [
    ("group", "SO", "write nothing: rotations are the default"),
    ("group", "O", "write reflections=True"),
    ("group", "GL", 'write method="flexlora"'),
    ("reference", "consensus", 'write method="fedrot-consensus"'),
    ("reference", "global", "write nothing: the reference is always"),
    ("strength", "auto", 'write method="fedrot-adaptive"'),
    ("align_on", "error", 'write method="fedrot-least-error"'),
    ("previous", True, "fedrot-consensus"),
]


def refused(argv, capsys, message, output):
    """Refused in one line that names the new spelling, and nothing is written."""
    assert main(argv) == 1
    printed = capsys.readouterr().err
    assert message in printed and "is a spelling of fedrot 0.1" in printed and printed.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("way", ["words", "dashes", "equals", "file"])
@pytest.mark.parametrize("command", ["simulate", "compare"])
@pytest.mark.parametrize(("name", "value", "message"), OLD)
def test_old_spellings_name_the_new_ones(tmp_path, capsys, command, name, value, message, way):
    if way == "file":
        (tmp_path / "old.yaml").write_text(yaml.safe_dump({"rounds": 1, name: value}))
        argv = ["--config", str(tmp_path / "old.yaml")]
    else:
        flag = f"--{name.replace('_', '-') if way == 'dashes' else name}"
        argv = [f"{flag}={value}"] if way == "equals" else [flag, str(value)]
    output = tmp_path / "out"
    refused([command, *argv, "--output", str(output)], capsys, message, output)


@pytest.mark.parametrize(
    "where",
    [
        lambda name, value: [f"--vary.{name}", str(value), "x"],
        lambda name, value: ["--vary", f"{{{name}: [{value}]}}"],
        lambda name, value: [f"--per-method.fedrot.{name}", str(value)],
        lambda name, value: [f"--variants.x.{name}", str(value)],
        lambda name, value: ["--variants", f"{{x: {{{name}: {value}}}}}"],
    ],
    ids=["vary", "vary, a mapping", "per method", "variant", "variants, a mapping"],
)
@pytest.mark.parametrize(("name", "value", "message"), OLD)
def test_old_spellings_within_a_comparison_name_the_new_ones(tmp_path, capsys, name, value, message, where):
    output = tmp_path / "out"
    refused(["compare", *where(name, value), "--output", str(output)], capsys, message, output)


@pytest.mark.parametrize(
    "options",
    [
        {"strengths": [0.5, "auto"]},
        {"vary": {"strength": [0.5, "auto"]}},
        {"per_method": {"fedrot": {"strength": "auto"}}},
        {"variants": {"x": {"strength": "auto"}}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_comparison_in_a_file_or_in_python_names_the_new_spelling(tmp_path, capsys, options):
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(options))
    output = tmp_path / "out"
    argv = ["compare", "--config", str(tmp_path / "old.yaml"), "--output", str(output)]
    refused(argv, capsys, 'write method="fedrot-adaptive"', output)
    with pytest.raises(ValueError, match="fedrot-adaptive"):
        Comparison(**options).runs()


def test_the_strengths_of_the_command_line_name_the_new_spelling(tmp_path, capsys):
    output = tmp_path / "out"
    argv = ["compare", "--strengths", "0.5", "auto", "--output", str(output)]
    refused(argv, capsys, 'write method="fedrot-adaptive"', output)


@pytest.mark.parametrize("value", [{"strength": "auto"}, {"align_on": "error"}])
def test_a_configuration_in_python_names_the_new_spelling(value):
    with pytest.raises(ValueError, match=r"is a spelling of fedrot 0\.1; write method"):
        SimulationConfig(**value)


@pytest.mark.parametrize("options", [{}, {"methods": ["fedit"]}], ids=["simulate", "compare"])
@pytest.mark.parametrize(("name", "value", "message"), OLD)
def test_an_old_run_is_not_resumed_but_told_the_new_spelling(tmp_path, capsys, name, value, message, options):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"rounds": 1, name: value} | options))
    assert main(["compare" if options else "simulate", f"--resume={folder}"]) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
