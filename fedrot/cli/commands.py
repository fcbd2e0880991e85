"""The commands. Only ``simulate`` and ``compare`` load the simulator; the rest needs nothing but fedrot."""

import argparse
import sys
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

from ..adapters.files import check_new
from ..adapters.folder import read_adapter
from ..merging.merge import merge
from ..methods.registry import METHODS, methods_table
from ..options import OPTION_NAMES, refuse_old_spellings
from ..report.result import AggregationResult
from ..server.aggregate import aggregate
from .parser import SIMULATOR, make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 for bad input, 2 for a wrong command line, 130 for an interrupt.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in SIMULATOR:
            return _load_simulator()(argv[0], argv[1:])
        args = make_parser().parse_args(argv)
        refuse_old_spellings({name: x for name, x in vars(args).items() if x is not None})
        _COMMANDS[args.command](args)
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"fedrot: error: {error}", file=sys.stderr)
        return 1


def _aggregate(args: argparse.Namespace) -> None:
    check_new(args.output)
    result = _aggregate_folders(args)
    print(result.report)
    _explain_no_rotation(result, args)
    result.save(args.output, updates=args.folders, record=_record(args, "folders", "weights", "reference", "round"))
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
    check_new(args.output)
    options = {"rank": args.rank, "alpha": args.alpha, "method": args.method, "reflections": args.reflections}
    result = merge(args.folders, args.weights, **options)
    bases = {str(read_adapter(folder)[1].get("base_model_name_or_path")) for folder in args.folders}
    if len(bases) > 1:  # not an error, because paths differ between machines
        print(f"note: the adapters name the base models {', '.join(sorted(bases))}", file=sys.stderr)
    print(result.report)
    result.save(args.output, record=_record(args, "folders", "weights", "rank", "alpha"))
    print(f"written to {args.output}")


def _inspect(args: argparse.Namespace) -> None:
    print(f"averaged as they are\n{_aggregate_folders(args, method='fedrot', strength=0.0).report}")
    rotated = _aggregate_folders(args)
    print(f"\nrotated, then averaged\n{rotated.report}")
    _explain_no_rotation(rotated, args)


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
        print(
            "no client was rotated: the factor to align is zero in the reference (B is in a fresh adapter), or the clients "
            "agree with it; odd rounds align A (--round 1, or --align-on A)"
        )


def _load_simulator() -> Callable[[str, list[str]], int]:
    try:
        from ..simulation.cli import main as simulator
    except ModuleNotFoundError as error:
        raise ValueError(f"the simulator needs {error.name}; install it with: pip install 'fedrot[simulate]'") from error
    return simulator
