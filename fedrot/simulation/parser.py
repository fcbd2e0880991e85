"""The options of ``fedrot simulate`` and ``fedrot compare``: the configuration's fields, a YAML file, or both."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_parsing_settings

from .config import SimulationConfig, Start
from .run import CONFIG
from .sweep.fields import LISTS, refuse_old_options
from .sweep.layers import option_groups, overlay, split_options, without
from .sweep.presets import describe_presets, load_preset

_RESUME = {
    "simulate": "The folder of an interrupted run to finish; give no other option.",
    "compare": "The folder of an interrupted comparison to finish; give no other option than --workers.",
}
_METHODS = "The methods to run; all stands for all of them."
_STRENGTHS = "The values of λ (strength). Methods that use λ are run with each of them."
_STARTS = "What clients start from: shared, one adapter for all, or independent, an adapter of each client's own."
_VARY = (
    "Fields to vary, each with its values: --vary.clients 3 10 50 --vary.lora.r 2 4 8. "
    "In YAML, vary: {clients: [3, 10, 50], lora.r: [2, 4, 8]}."
)
_PER_METHOD = (
    "Fields whose values differ for one method: --per_method.rolora.lr 0.001. In YAML, per_method: {rolora: {lr: 0.001}}. "
    "Of a field that is varied, a list of as many values: --vary.lr 0.005 0.02 --per_method.rolora.lr '[0.0005, 0.001]'."
)
_WORKERS = (
    "The number of processes. Each has its share of PyTorch's threads and takes one run at a time. With --resume it may "
    "differ from what it was before."
)
_VARIANTS = (
    "Settings to run beside the methods, under names of your own. The method of a setting is fedrot unless it sets another: "
    "--variants.both.align_on joint. In YAML, variants: {both: {align_on: joint}}."
)


def parse(command: str, argv: list[str]) -> Namespace | None:
    """Parse the arguments of a command.

    Args:
        command: "simulate" or "compare".
        argv: the arguments after the command, with underscores in the options' names.

    Returns:
        The options, or None if the arguments asked for a list, which has been printed.

    Raises:
        ArgumentError: an option that there is not, or a value that it does not take.
        ValueError: options that do not go together, or a spelling of fedrot 0.1.
    """
    groups = option_groups(argv)
    for name, values, _ in groups:
        for value in values or [""]:
            refuse_old_options({name: value})
    parser = make_parser(command)
    if any(name == "resume" for name, _, _ in groups):
        folder = parser.parse_args(argv).resume
        if {name for name, _, _ in groups} - {"resume", "workers"}:
            raise ValueError("--resume takes its configuration from the run; give no other option")
        _check_resumable(Path(folder), command)
        workers = [token for name, _, tokens in groups if name == "workers" for token in tokens]
        return parser.parse_args(["--config", str(Path(folder) / CONFIG), "--resume", folder, *workers])
    if command == "simulate":
        for name, values, _ in groups:
            if name == "config" and values and Path(values[0]).is_file():
                _read(values[0])
        return parser.parse_args(argv)
    given, rest, fields = split_options(argv)
    preset, file = given.pop("preset", None), given.pop("config", None)
    if preset == "help":
        for name, text in describe_presets().items():
            print(f"{name:28} {text}")
        return None
    options = overlay(load_preset(preset) if preset else {}, _read(file) if file else {})
    options = without(overlay(options, given), fields)
    if "vary" in options:  # in the order that the names of folders have
        options["vary"] = dict(sorted(options["vary"].items()))
    return parser.parse_args([*(["--config", yaml.safe_dump(options, sort_keys=False)] if options else []), *rest])


def _read(file: str) -> dict[str, Any]:
    """Read the options of a YAML file, and refuse those of fedrot 0.1."""
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file} to take the configuration from")
    options = get_loader("yaml")(Path(file).read_text("utf-8"))
    if not isinstance(options, dict):
        raise ValueError(f"{file} does not map options to values")
    refuse_old_options(options)
    return options


def _check_resumable(folder: Path, command: str) -> None:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}; --resume takes the folder of an earlier run")
    fields = yaml.safe_load((folder / CONFIG).read_text("utf-8"))
    refuse_old_options(fields)
    made_by = "compare" if "methods" in fields else "simulate"
    if made_by != command:
        raise ValueError(f"{folder} was made by fedrot {made_by}; go on with: fedrot {made_by} --resume {folder}")


def make_parser(command: str) -> ArgumentParser:
    """Make the parser of a command. ``compare`` has lists where ``simulate`` has one method, strength, start and seed."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    simulating = command == "simulate"
    text = "One federated run." if simulating else "Methods side by side, from shared and independent starts, over seeds."
    parser = ArgumentParser(prog=f"fedrot {command}", description=text, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML file of the options below.")
    parser.add_argument("--output", type=str, help="A new folder for the results (default: one below runs/).")
    parser.add_argument("--resume", type=str, help=_RESUME[command])
    if not simulating:
        parser.add_argument("--workers", type=int, default=1, help=_WORKERS)
        parser.add_argument(
            "--preset", type=str, help="A ready-made comparison, which other options override; help lists them."
        )
        parser.add_argument("--methods", nargs="+", type=str, default=["fedit", "fedrot"], help=_METHODS)
        parser.add_argument("--strengths", nargs="+", type=float, default=[0.5, 1.0], help=_STRENGTHS)
        parser.add_argument("--starts", nargs="+", type=Start, default=list(get_args(Start)), help=_STARTS)
        parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Everything is run with each seed.")
        parser.add_argument("--vary", type=dict[str, list[Any]], default={}, help=_VARY)
        parser.add_argument("--per_method", type=dict[str, dict[str, Any]], default={}, help=_PER_METHOD)
        parser.add_argument("--variants", type=dict[str, dict[str, Any]], default={}, help=_VARIANTS)
    parser.add_class_arguments(SimulationConfig, skip=set() if simulating else set(LISTS))
    # jsonargparse finds the fields' own docstrings; what is inherited from AggregationOptions has its help as metadata.
    meanings = {f.name: f.metadata["help"] for f in dataclasses.fields(SimulationConfig) if "help" in f.metadata}
    for action in parser._actions:
        if action.dest in meanings:
            action.help = meanings[action.dest].replace("%", "%%")
    return parser
