"""The commands. Only ``simulate`` and ``compare`` load the simulator; the rest needs nothing but fedrot."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

from ..adapters.files import check_new
from ..adapters.update import open_updates
from ..errors import UpdateError
from ..merging.merge import merge
from ..merging.plan import plan_merge
from ..merging.preview import preview_merge
from ..methods.registry import METHODS, methods_table
from ..options import OPTION_NAMES, refuse_old_spellings
from ..report.describe import describe_update
from ..report.result import AggregationResult
from ..server.aggregate import aggregate
from .parser import SIMULATOR, make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 for bad input, 2 for a wrong command line, 130 for an interrupt, 141 where what reads the
        output has ended, as ``head`` does.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:  # after SystemExit too, which --help raises
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would say so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: list[str]) -> int:
    try:
        if argv and argv[0] in SIMULATOR:
            return _load_simulator()(argv[0], argv[1:])
        args = make_parser().parse_args(argv)
        refuse_old_spellings({name: x for name, x in vars(args).items() if x is not None})
        _COMMANDS[args.command](args)
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"fedrot: error: {error}", file=sys.stderr)
        return 1


def _aggregate(args: argparse.Namespace) -> None:
    check_new(args.output)
    result = _aggregate_folders(args)
    # Before anything is printed, which ends the command if nobody reads it.
    result.save(args.output, updates=args.folders, record=_record(args, "folders", "weights", "reference", "round"))
    print(result.report)
    _explain_no_rotation(result, args)
    if result.personal:
        print(f"written to {args.output}, a folder per client: what is shared and its own B")
    elif result.base_update is not None:
        print(
            f"written to {args.output}: merge base_update into the base model (PeftModel.from_pretrained(base, "
            f'"{args.output}/base_update").merge_and_unload()), then load adapter on it'
        )
    else:
        print(f"written to {args.output}")


def _merge(args: argparse.Namespace) -> None:
    options: dict[str, Any] = {
        "normalize": args.normalize == "yes",
        "modules_to_save": args.modules_to_save,
        "base": args.base,
    }
    renaming = None if args.rename is None else dict(pair for pair in args.rename if pair is not None)
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always", UserWarning)
        if args.dry_run:
            plan = plan_merge(args.folders, args.weights, None, renaming=renaming, **options)
            print(preview_merge(plan, reflections=args.reflections))
        else:
            check_new(args.output)
            options |= {"rank": args.rank, "alpha": args.alpha, "method": args.method, "reflections": args.reflections}
            result = merge(args.folders, args.weights, rename=renaming, **options)
            record = _record(args, "folders", "weights", "rank", "alpha", "modules_to_save", "base")
            result.save(args.output, record=record | {"normalize": args.normalize == "yes", "rename": renaming})
            print(result.report)
            print(f"written to {args.output}")
    for warning in noticed:
        print(f"note: {warning.message}", file=sys.stderr)


def _inspect(args: argparse.Namespace) -> None:
    _describe(args)
    plain = _aggregate_folders(args, method="fedrot", strength=0.0, report_error=True)
    print(f"averaged as they are\n{plain.report}")
    rotated = _aggregate_folders(args, report_error=True)
    print(f"\nrotated, then averaged\n{rotated.report}")
    _explain_no_rotation(rotated, args)


def _describe(args: argparse.Namespace) -> None:
    """Print what the adapters are taken to be, those that are alike once."""
    alike: dict[str, list[str]] = {}
    updates = open_updates(args.folders, alike=False)
    for update in updates:
        alike.setdefault(describe_update(update), []).append(update.name)
    for text, names in alike.items():
        print(f"{'; '.join(names)}\n{text}\n")
    first = updates[0]
    if other := next((update for update in updates if update.specs.keys() != first.specs.keys()), None):
        key = min(other.specs.keys() ^ first.specs.keys())
        raise UpdateError(
            f"{other.name} and {first.name} have unlike modules (only one has {key}), and inspect compares clients of one "
            "federation; fedrot merge takes them, and with --dry-run shows what merging loses"
        )


def _show_methods(_: argparse.Namespace) -> None:
    print(methods_table())


_COMMANDS = MappingProxyType({"aggregate": _aggregate, "merge": _merge, "inspect": _inspect, "methods": _show_methods})


def _aggregate_folders(args: argparse.Namespace, **changed: Any) -> AggregationResult:
    options = {name: value for name, value in vars(args).items() if name in OPTION_NAMES}
    return aggregate(args.folders, args.weights, args.reference, round=args.round, **options | changed)


def _record(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Collect what the result's record keeps of the command line beside the options."""
    return {name: getattr(args, name) for name in names}


def _explain_no_rotation(result: AggregationResult, args: argparse.Namespace) -> None:
    rotates = "reflections" in METHODS[result.report.method].uses
    if rotates and args.strength != 0 and result.report.angle == 0 and len(args.folders) > 1:
        untrained = "the reference is untrained, because a factor of each of its adapters is zero"
        agree = "the clients agree with the reference in the factor that is aligned"
        why = untrained if result.report.target is None else agree
        print(f"no client was rotated: {why}; without --reference clients are rotated towards each other")


def _load_simulator() -> Callable[[str, list[str]], int]:
    try:
        from ..simulation.cli import main as simulator
    except ModuleNotFoundError as error:
        raise ValueError(f"the simulator needs {error.name}; install it with: pip install 'fedrot[simulate]'") from error
    return simulator
