"""``fedrot simulate`` and ``fedrot compare``, whose options are the configuration's fields, a YAML file, or both."""

import dataclasses
import re
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import datasets
import pandas as pd
import torch
import transformers
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader, set_parsing_settings

from ..methods.registry import METHODS
from .config import SimulationConfig, Start
from .metrics import SCORES, shown_score
from .run import CONFIG, CURVES, FOLDED_MODEL, simulate
from .sweep.compare import compare
from .sweep.comparison import Comparison
from .sweep.fields import LISTS, drop_field, has_field, refuse_old_options
from .sweep.layers import option_groups, overlay, split_options, without
from .sweep.presets import describe_presets, load_preset

_SITUATIONS = {
    "shared": "all clients start from one adapter, and are rotated towards it.",
    "independent": "each client starts from an adapter of its own; the first round is rotated towards the largest "
    "client's adapter, and by fedrot-consensus towards each other.",
}

_METHODS = "The methods to run; all stands for all of them."
_STRENGTHS = "The values of λ (strength). Methods that use λ are run with each of them."
_STARTS = "What clients start from: shared, one adapter for all, or independent, an adapter of each client's own."
_VARY = (
    "Fields to vary, each with its values: --vary.clients 3 10 50 --vary.lora.r 2 4 8. "
    "In YAML, vary: {clients: [3, 10, 50], lora.r: [2, 4, 8]}."
)
_PER_METHOD = (
    "Fields whose values differ for one method: --per_method.rolora.lr 0.001. In YAML, per_method: {rolora: {lr: 0.001}}."
)
_VARIANTS = (
    "Settings to run beside the methods, under names of your own. The method of a setting is fedrot unless it sets another: "
    "--variants.both.align_on joint. In YAML, variants: {both: {align_on: joint}}."
)


def main(command: str, argv: list[str]) -> int:
    """Run one of the two commands.

    Args:
        command: "simulate" or "compare".
        argv: the arguments after the command.

    Returns:
        The exit status: 0, 2 for a wrong command line, 130 for an interrupt.

    Raises:
        ValueError: options that do not go together, or a spelling of fedrot 0.1.
        OSError: a folder that exists, or a file that cannot be read.
    """
    # Options may be written with dashes too: --local-steps is --local_steps. Names of variants keep theirs.
    argv = [re.sub(r"^--(?!variants\.)[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    try:
        args = _parse(command, argv)
        if args is None:
            return 0
    except ArgumentError as error:
        message = " ".join(str(error).split())
        print(f"fedrot {command}: error: {message}; see fedrot {command} --help", file=sys.stderr)
        return 2
    _quiet_libraries()
    if args.model == "digits" and "model" not in args.get("vary", {}):
        # So small a model gains little from a second thread, which on a busy machine costs a multiple.
        torch.set_num_threads(1)
    folder = Path(args.resume or args.output or f"runs/{command}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        (_simulate if command == "simulate" else _compare)(args, folder)
    except KeyboardInterrupt:
        if folder.exists():
            print(f"\ninterrupted; go on with: fedrot {command} --resume {folder}", file=sys.stderr)
        return 130
    return 0


def _parse(command: str, argv: list[str]) -> Namespace | None:
    """Parse the command line; None if it asked for a list, which has been printed."""
    for name, values, _ in option_groups(argv):
        for value in values or [""]:
            refuse_old_options({name: value})
    parser = make_parser(command)
    if resume := [a for a in argv if a.startswith("--resume")]:
        folder = parser.parse_args(argv).resume
        if len(resume) < len([a for a in argv if a.startswith("--")]):
            raise ValueError("--resume takes its configuration from the run; give no other option")
        _check_resumable(Path(folder), command)
        return parser.parse_args(["--config", str(Path(folder) / CONFIG), "--resume", folder])
    if command == "simulate":
        for name, values, _ in option_groups(argv):
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


def _quiet_libraries() -> None:
    """Keep the progress bar readable: no shard bars, no notes on heads that are new or on hub look-ups."""
    transformers_log: Any = transformers.utils.logging
    transformers_log.disable_progress_bar()
    transformers_log.set_verbosity_error()
    datasets.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Could not find a config file in", module="peft")


def make_parser(command: str) -> ArgumentParser:
    """Make the parser of a command. ``compare`` has lists where ``simulate`` has one method, strength, start and seed."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    simulating = command == "simulate"
    text = "One federated run." if simulating else "Methods side by side, from shared and independent starts, over seeds."
    parser = ArgumentParser(prog=f"fedrot {command}", description=text, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML file of the options below.")
    parser.add_argument("--output", type=str, help="A new folder for the results (default: one below runs/).")
    parser.add_argument("--resume", type=str, help="The folder of an interrupted run to finish; give no other option.")
    if not simulating:
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


def _simulate(args: Namespace, folder: Path) -> None:
    config = SimulationConfig(**_fields(args))
    result = simulate(config, folder, resume=args.resume is not None)
    last = result.metrics[-1]
    score = shown_score(pd.DataFrame(result.metrics))
    error = last["relative_error"]
    print(
        f"\n{config.method}, {config.start} start, {len(result.metrics)} rounds: {SCORES[score]} {last[score]:.3f}, "
        + ("" if error is None else f"relative aggregation error {error:.3f}, ")
        + f"mean rotation {last['rotation_angle']:.1f}°"
    )
    print(f"{folder}/{CURVES} shows them by round; {_where(config.method, folder)}.")


def _where(method: str, folder: Path) -> str:
    """Say where the final adapter is, and on which model it belongs."""
    if METHODS[method].updates_base:
        return f"{folder}/adapter is the final adapter, a PEFT folder, for the model in {folder}/{FOLDED_MODEL}"
    if (folder / "adapter").exists():
        return f"{folder}/adapter is the final adapter, a PEFT folder"
    return f"{folder}/adapters has every client's final adapter, PEFT folders"


def _compare(args: Namespace, folder: Path) -> None:
    fields = _fields(args)
    for name in args.vary:
        if has_field(fields, name):  # a default, which the varied values replace
            fields = drop_field(fields, name)
    own = {name: args[name] for name in (*LISTS.values(), "vary", "per_method", "variants")}
    table = compare(Comparison.of({**fields, **own}), folder, resume=args.resume is not None)
    print(f"\n{table}\n")
    for start in args.starts:
        print(f"{start} start: {_SITUATIONS[start]}")
    print(f"{folder}/{CURVES} shows them by round.")


def _fields(args: Namespace) -> dict[str, Any]:
    return {field.name: args[field.name] for field in dataclasses.fields(SimulationConfig) if field.name in args}
