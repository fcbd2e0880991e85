"""The command line. Only ``simulate`` and ``compare`` load the simulator; the rest needs nothing but fedrot."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import get_args

from ..adapters.files import check_new, new_folder
from ..adapters.folder import read_adapter, write_adapter
from ..merge import MergeMethod, merge
from ..methods.registry import METHODS, methods_table
from ..options import AlignOn, RotationGroup, Strength
from ..report.result import AggregationResult
from ..server.aggregate import aggregate
from ..server.validation import OnInvalid

_SIMULATOR = {"simulate": "run a federation in this process", "compare": "simulate several methods over several seeds"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 for bad input, 2 for a wrong command line, 130 for an interrupt."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in _SIMULATOR:
            return _simulator()(*argv[:1], argv[1:])
        args = make_parser().parse_args(argv)
        args.run(args)
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"fedrot: error: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of everything but the simulator's options."""
    parser = argparse.ArgumentParser(prog="fedrot", description="Federated averaging of LoRA adapters in a common basis.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('fedrot')}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, text in _SIMULATOR.items():
        commands.add_parser(name, help=text)

    average = commands.add_parser("aggregate", help="merge the adapters of one round into one")
    _add_adapters(average)
    average.add_argument("--method", default="fedrot", choices=METHODS, help="the aggregation method (default: %(default)s)")
    average.add_argument("--output", required=True, metavar="DIR", help="a new folder for the merged adapter and its report")
    average.add_argument("--seed", type=int, default=0, help="of methods that draw at random (default: %(default)s)")
    average.add_argument("--on-invalid", default="raise", choices=get_args(OnInvalid), help="what to do with NaN or Inf")
    average.set_defaults(run=_aggregate)

    merging = commands.add_parser("merge", help="merge adapters that were trained independently into one")
    merging.add_argument("folders", nargs="+", metavar="DIR", help="PEFT folders of one base, of any ranks and modules")
    merging.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per folder (default: all equal)")
    merging.add_argument("--rank", type=int, metavar="R", help="of the merged adapter (default: the adapters' largest)")
    merging.add_argument("--alpha", type=float, metavar="α", help="its lora_alpha (default: the widest adapter's scaling)")
    merging.add_argument(
        "--method",
        default="fedrot",
        choices=get_args(MergeMethod),
        help="fedrot: align by least error and average (default); flexlora: the best adapter of the rank, which loses less",
    )
    merging.add_argument("--group", default="SO", choices=get_args(RotationGroup), help="default: %(default)s")
    merging.add_argument("--output", required=True, metavar="DIR", help="a new folder for the merged adapter and its report")
    merging.set_defaults(run=_merge)

    inspect = commands.add_parser("inspect", help="what averaging adapters would lose, as they are and rotated")
    _add_adapters(inspect)
    inspect.set_defaults(run=_inspect)

    methods = commands.add_parser("methods", help="what each method communicates, costs, and loses")
    methods.set_defaults(run=lambda args: print(methods_table()))
    return parser


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="PEFT folders, one per client")
    parser.add_argument(
        "--reference",
        metavar="DIR",
        help="the adapter the clients started from (default: the heaviest's), or the word consensus: rotate to each other",
    )
    parser.add_argument("--previous", metavar="DIR", help="with the reference consensus, the adapter they started from")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per folder (default: all equal)")
    parser.add_argument("--align-on", default="alternate", choices=get_args(AlignOn), help="default: %(default)s")
    parser.add_argument("--round", type=int, default=0, help="its number, from 0: even rounds align B, odd rounds A")
    parser.add_argument(
        "--strength",
        type=_strength,
        help="λ from 0 to 1, or auto (default: 0.5, or 1 with consensus and --align-on error)",
    )
    parser.add_argument("--group", default="SO", choices=get_args(RotationGroup), help="default: %(default)s")


def _strength(text: str) -> Strength:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}") from None


def _aggregate_folders(
    args: argparse.Namespace, method: str, on_invalid: OnInvalid = "raise", seed: int = 0, strength: Strength | None = None
) -> AggregationResult:
    return aggregate(
        args.folders,
        args.weights,
        args.reference,
        previous=args.previous,
        method=method,
        align_on=args.align_on,
        round=args.round,
        strength=args.strength if strength is None else strength,
        group=args.group,
        on_invalid=on_invalid,
        seed=seed,
    )


def _aggregate(args: argparse.Namespace) -> None:
    check_new(args.output)
    result = _aggregate_folders(args, args.method, args.on_invalid, args.seed)
    options = {name: value for name, value in vars(args).items() if name != "run"}
    report = {"options": options, **result.report.as_dict()}
    assert result.config is not None  # folders have one
    print(result.report)
    _explain_no_rotation(result, args)
    if result.personal:
        with new_folder(args.output) as folder:
            for number, path in enumerate(args.folders):
                if f"client {number} ({path})" in result.report.dropped:
                    continue
                own, config = read_adapter(path)
                write_adapter(folder / f"client{number}", {**own, **result.state_dict}, config, report)
        print(f"written to {args.output}, a folder per client: what is shared and its own B")
    elif result.base_update is not None:
        assert result.base_config is not None
        with new_folder(args.output) as folder:
            write_adapter(folder / "adapter", result.state_dict, result.config, report)
            write_adapter(folder / "base_update", result.base_update, result.base_config)
        print(
            f"written to {args.output}: merge base_update into the base model (PeftModel.from_pretrained(base, "
            f'"{args.output}/base_update").merge_and_unload()), then load adapter on it'
        )
    else:
        write_adapter(args.output, result.state_dict, result.config, report)
        print(f"written to {args.output}")


def _merge(args: argparse.Namespace) -> None:
    check_new(args.output)
    result = merge(args.folders, args.weights, rank=args.rank, alpha=args.alpha, method=args.method, group=args.group)
    assert result.config is not None
    bases = [str(read_adapter(folder)[1].get("base_model_name_or_path")) for folder in args.folders]
    if len(set(bases)) > 1:  # which need not mean anything: paths differ between machines
        print(f"note: the adapters name the base models {', '.join(sorted(set(bases)))}", file=sys.stderr)
    options = {name: value for name, value in vars(args).items() if name != "run"}
    print(result.report)
    write_adapter(args.output, result.state_dict, result.config, {"options": options, **result.report.as_dict()})
    print(f"written to {args.output}")


def _inspect(args: argparse.Namespace) -> None:
    print(f"averaged as they are\n{_aggregate_folders(args, 'fedrot', strength=0).report}")
    rotated = _aggregate_folders(args, "fedrot")
    print(f"\nrotated, then averaged\n{rotated.report}")
    _explain_no_rotation(rotated, args)


def _explain_no_rotation(result: AggregationResult, args: argparse.Namespace) -> None:
    if METHODS[result.report.method].rotates and args.strength != 0 and result.report.angle == 0 and len(args.folders) > 1:
        print(
            "no client was rotated: the factor to align is zero in the reference (B is in a fresh adapter), or the clients "
            "agree with it; odd rounds align A (--round 1, or --align-on A)"
        )


def _simulator():
    try:
        from ..simulation.cli import main as simulator
    except ModuleNotFoundError as error:
        raise ValueError(f"the simulator needs {error.name}; install it with: pip install 'fedrot[simulate]'") from error
    return simulator
