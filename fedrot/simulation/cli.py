"""``fedrot simulate`` and ``fedrot compare``: the configuration's fields as options, or a YAML file, or both."""

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
from .plots import SCORES, shown_score
from .run import CONFIG, CURVES, FOLDED_MODEL, simulate
from .sweep.compare import compare
from .sweep.comparison import Comparison
from .sweep.fields import LISTS, drop_field, has_field
from .sweep.layers import overlay, split_options, without
from .sweep.presets import describe_presets, load_preset

_SITUATIONS = {
    "shared": "all clients start from one adapter, and are rotated towards it.",
    "independent": "each client starts from an adapter of its own; the first round is rotated towards the largest "
    "client's, by consensus towards each other.",
}

_VARY = (
    "Fields to vary, each with its values: --vary.clients 3 10 50 --vary.lora.r 2 4 8. "
    "In YAML, vary: {clients: [3, 10, 50], lora.r: [2, 4, 8]}."
)
_PER_METHOD = "Fields that a method has otherwise: --per_method.rolora.lr 0.001. In YAML, per_method: {rolora: {lr: 0.001}}."
_VARIANTS = (
    "Settings of a method (fedrot, unless one says otherwise) to run beside the methods, by names of your own: "
    "--variants.both.align_on joint. In YAML, variants: {both: {align_on: joint}}."
)


def main(command: str, argv: list[str]) -> int:
    """Run one of the two commands. Returns the exit status."""
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
    """The options, or None if what was asked for has been printed."""
    parser = make_parser(command)
    if resume := [a for a in argv if a.startswith("--resume")]:
        folder = parser.parse_args(argv).resume
        if len(resume) < len([a for a in argv if a.startswith("--")]):
            raise ValueError("--resume takes its configuration from the run; give no other option")
        _check_resumable(Path(folder), command)
        return parser.parse_args(["--config", str(Path(folder) / CONFIG), "--resume", folder])
    if command == "simulate":
        return parser.parse_args(argv)
    given, rest, fields = split_options(argv)
    preset, file = given.pop("preset", None), given.pop("config", None)
    if preset == "help":
        for name, text in describe_presets().items():
            print(f"{name:28} {text}")
        return None
    options = load_preset(preset) if preset else {}
    options = overlay(options, _read(file) if file else {})
    options = without(overlay(options, given), fields)
    if "vary" in options:  # in the order that the names of folders have
        options["vary"] = dict(sorted(options["vary"].items()))
    return parser.parse_args([*(["--config", yaml.safe_dump(options, sort_keys=False)] if options else []), *rest])


def _read(file: str) -> dict[str, Any]:
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file} to take the configuration from")
    options = get_loader("yaml")(Path(file).read_text("utf-8"))
    if not isinstance(options, dict):
        raise ValueError(f"{file} does not map options to values")
    return options


def _check_resumable(folder: Path, command: str) -> None:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}; --resume takes the folder of an earlier run")
    fields = yaml.safe_load((folder / CONFIG).read_text("utf-8"))
    made_by = "compare" if "methods" in fields else "simulate"
    if made_by != command:
        raise ValueError(f"{folder} was made by fedrot {made_by}; go on with: fedrot {made_by} --resume {folder}")


def _quiet_libraries() -> None:
    """Keep the progress bar readable: no shard bars, no notes on heads that are new or on hub look-ups."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Could not find a config file in", module="peft")


def make_parser(command: str) -> ArgumentParser:
    """The options of a command; those of ``compare`` have lists of what it varies."""
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
        parser.add_argument("--methods", nargs="+", type=str, default=["fedit", "fedrot"], help="all is all of them.")
        parser.add_argument("--strengths", nargs="+", type=float, default=[0.5, 1.0], help="λ of the methods that rotate.")
        parser.add_argument("--starts", nargs="+", type=Start, default=list(get_args(Start)), help="See start of simulate.")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Each gets a run of each.")
        parser.add_argument("--vary", type=dict[str, list[Any]], default={}, help=_VARY)
        parser.add_argument("--per_method", type=dict[str, dict[str, Any]], default={}, help=_PER_METHOD)
        parser.add_argument("--variants", type=dict[str, dict[str, Any]], default={}, help=_VARIANTS)
    parser.add_class_arguments(SimulationConfig, skip=set() if simulating else set(LISTS))
    return parser


def _simulate(args: Namespace, folder: Path) -> None:
    config = SimulationConfig(**_fields(args))
    result = simulate(config, folder, resume=args.resume is not None)
    last = result.metrics[-1]
    score = shown_score(pd.DataFrame(result.metrics))
    print(
        f"\n{config.method}, {config.start} start, {len(result.metrics)} rounds: "
        f"{SCORES[score]} {last[score]:.3f}, relative aggregation error {last['relative_error']:.3f}, "
        f"mean rotation {last['rotation_angle']:.1f}°"
    )
    print(f"{folder}/{CURVES} shows them by round; {_where(config.method, folder)}.")


def _where(method: str, folder: Path) -> str:
    """Where the final adapter is, and on which model it belongs."""
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
