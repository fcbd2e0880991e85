"""``fedrot simulate`` and ``fedrot compare``: the configuration's fields as options, or a YAML file, or both."""

import re
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import get_args

import datasets
import torch
import transformers
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from ..methods import METHODS
from .compare import VARIED, compare
from .config import SimulationConfig, Start
from .run import CONFIG, CURVES, SimulationResult, simulate

_SITUATIONS = {
    "shared": "all clients start from one adapter, and are rotated towards it.",
    "independent": "each client starts from an adapter of its own; the first round is rotated towards the largest client's.",
}


def main(command: str, argv: list[str]) -> int:
    """Run one of the two commands. Returns the exit status."""
    parser = make_parser(command)
    # Options may be written with dashes too: --local-steps is --local_steps.
    argv = [re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    try:
        args = parser.parse_args(argv)
        resume = args.resume is not None
        folder = Path(args.resume if resume else args.output or f"runs/{command}-{datetime.now():%Y%m%d-%H%M%S}")
        if resume:
            if [a for a in argv if a.startswith("--") and not a.startswith("--resume")]:
                raise ValueError("--resume takes its configuration from the run; give no other option")
            _check_resumable(folder, command)
            args = parser.parse_args(["--config", str(folder / CONFIG)])
    except ArgumentError as error:
        message = " ".join(str(error).split())
        print(f"fedrot {command}: error: {message}; see fedrot {command} --help", file=sys.stderr)
        return 2
    fields = vars(SimulationConfig()).keys() & vars(args).keys()
    config = SimulationConfig(**{name: args[name] for name in fields})
    _quiet_libraries()
    if config.model == "digits":
        # So small a model gains little from a second thread, which on a busy machine costs a multiple.
        torch.set_num_threads(1)
    try:
        _run(command, config, folder, args, resume)
    except KeyboardInterrupt:
        if folder.exists():
            print(f"\ninterrupted; go on with: fedrot {command} --resume {folder}", file=sys.stderr)
        return 130
    return 0


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
    parser = ArgumentParser(prog=f"fedrot {command}", description=text, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file of the options below.")
    parser.add_argument("--output", type=str, help="A new folder for the results (default: one below runs/).")
    parser.add_argument("--resume", type=str, help="The folder of an interrupted run to finish; give no other option.")
    if not simulating:
        parser.add_argument("--methods", nargs="+", type=str, default=list(METHODS), help="The methods to compare.")
        parser.add_argument("--strengths", nargs="+", type=float, default=[0.5, 1.0], help="λ of the methods that rotate.")
        parser.add_argument("--starts", nargs="+", type=Start, default=list(get_args(Start)), help="See start of simulate.")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Each gets a run of each.")
    parser.add_class_arguments(SimulationConfig, skip=set() if simulating else set(VARIED))
    return parser


def _run(command: str, config: SimulationConfig, folder: Path, args: Namespace, resume: bool) -> None:
    if command == "simulate":
        _show(simulate(config, folder, resume=resume))
        return
    varied = {name: args[name] for name in ("methods", "strengths", "starts", "seeds")}
    table = compare(config, folder, **varied, resume=resume)
    print(f"\n{table}\n")
    for start in args.starts:
        print(f"{start} start: {_SITUATIONS[start]}")
    print(f"{folder}/{CURVES} shows them by round.")


def _show(result: SimulationResult) -> None:
    last = result.metrics[-1]
    print(
        f"\n{result.config.method}, {result.config.start} start, {len(result.metrics)} rounds: "
        f"accuracy {result.accuracy:.3f}, relative aggregation error {last['relative_error']:.3f}, "
        f"mean rotation {last['rotation_angle']:.1f}°"
    )
    print(f"{result.folder}/{CURVES} shows them by round; {result.folder}/adapter is the final adapter, a PEFT folder.")
