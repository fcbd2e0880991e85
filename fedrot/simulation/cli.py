"""The commands ``fedrot simulate`` and ``fedrot compare``."""

import dataclasses
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jsonargparse import ArgumentError, Namespace

from ..methods.registry import METHODS
from .config import SimulationConfig
from .metrics import SCORES, shown_score
from .parser import parse
from .quiet import quiet_libraries
from .run import CURVES, FOLDED_MODEL, simulate
from .sweep.compare import compare
from .sweep.comparison import Comparison
from .sweep.fields import LISTS, drop_field, has_field

_SITUATIONS = {
    "shared": "all clients start from one adapter, and are rotated towards it.",
    "independent": "each client starts from an adapter of its own; the first round is rotated towards the consensus.",
}


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
        args = parse(command, argv)
        if args is None:
            return 0
    except ArgumentError as error:
        message = " ".join(str(error).split())
        print(f"fedrot {command}: error: {message}; see fedrot {command} --help", file=sys.stderr)
        return 2
    quiet_libraries()
    if args.model == "digits" and "model" not in args.get("vary", {}):
        # So small a model gains little from a second thread, which on a busy machine costs a multiple.
        torch.set_num_threads(1)
    folder = Path(args.resume or args.output or f"runs/{command}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        with _log_to_stderr():
            (_simulate if command == "simulate" else _compare)(args, folder)
    except KeyboardInterrupt:
        if folder.exists():
            workers = f" --workers {args.workers}" if args.get("workers", 1) > 1 else ""
            print(f"\ninterrupted; go on with: fedrot {command} --resume {folder}{workers}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Show the simulator's log, every line once: the runs of a comparison have much in common."""
    log, shown = logging.getLogger(__package__), set[str]()
    handler = logging.StreamHandler()

    def is_new(record: logging.LogRecord) -> bool:
        known = record.getMessage() in shown
        shown.add(record.getMessage())
        return not known

    handler.addFilter(is_new)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


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
    table = compare(Comparison.of({**fields, **own}), folder, resume=args.resume is not None, workers=args.workers)
    print(f"\n{table}\n")
    for start in args.starts:
        print(f"{start} start: {_SITUATIONS[start]}")
    print(f"{folder}/{CURVES} shows them by round.")


def _fields(args: Namespace) -> dict[str, Any]:
    return {field.name: args[field.name] for field in dataclasses.fields(SimulationConfig) if field.name in args}
