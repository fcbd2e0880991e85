"""The parser of the command line, but for the simulator's options."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from ..merge import MergeMethod
from ..methods.registry import METHODS
from ..options import AggregationOptions

SIMULATOR = MappingProxyType(
    {"simulate": "run a federation in this process", "compare": "simulate several methods over several seeds"}
)
Run = Callable[[argparse.Namespace], None]


def make_parser(aggregate: Run, merge: Run, inspect: Run, methods: Run) -> argparse.ArgumentParser:
    """Make the parser of everything but the simulator's options.

    Args:
        aggregate, merge, inspect, methods: what runs each command.
    """
    parser = argparse.ArgumentParser(prog="fedrot", description="Federated averaging of LoRA adapters in a common basis.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('fedrot')}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, text in SIMULATOR.items():
        commands.add_parser(name, help=text)

    average = commands.add_parser("aggregate", help="merge the adapters of one round into one")
    _add_adapters(average)
    average.add_argument("--output", required=True, metavar="DIR", help="a new folder for the merged adapter and its report")
    add_options(average)
    average.set_defaults(run=aggregate)

    merging = commands.add_parser("merge", help="merge adapters that were trained independently into one")
    merging.add_argument("folders", nargs="+", metavar="DIR", help="PEFT folders of one base, of any ranks and modules")
    merging.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per folder (default: all equal)")
    merging.add_argument("--rank", type=int, metavar="R", help="of the merged adapter (default: the adapters' largest)")
    merging.add_argument("--alpha", type=float, metavar="α", help="its lora_alpha (default: the widest adapter's scaling)")
    merging.add_argument(
        "--method",
        default="flexlora",
        choices=[*get_args(MergeMethod), "fedrot"],
        metavar="{" + ",".join(get_args(MergeMethod)) + "}",
        help="flexlora: the best adapter of the rank; fedrot-least-error: rotate so that averaging loses least, and "
        "average, which loses more and ends in the basis of one adapter (default: %(default)s)",
    )
    add_options(merging, "reflections")
    _refuse_group(merging)
    merging.add_argument("--output", required=True, metavar="DIR", help="a new folder for the merged adapter and its report")
    merging.set_defaults(run=merge)

    looking = commands.add_parser("inspect", help="what averaging adapters would lose, as they are and rotated")
    _add_adapters(looking)
    add_options(looking, "align_on", "strength", "reflections", "backend")
    looking.set_defaults(run=inspect)

    listing = commands.add_parser("methods", help="what each method communicates, costs, and loses")
    listing.set_defaults(run=methods)
    return parser


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the fields of ``AggregationOptions``, or those of these names, as options of the command line."""
    for f in fields(AggregationOptions):
        if names and f.name not in names:
            continue
        flag, default = "--" + f.name.replace("_", "-"), "" if f.default is None else " (default: %(default)s)"
        settings: dict[str, Any] = {"default": f.default, "help": f.metadata["help"].replace("%", "%%") + default}
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        elif f.name == "method":
            parser.add_argument(flag, choices=METHODS, **settings)
        else:
            parser.add_argument(flag, type=_parsed_as(f.type), metavar=_shown(f.type), **settings)


def _parsed_as(kind: Any) -> Callable[[str], Any]:
    """How a value is read: as the first number type of the annotation, or as it stands. ``AggregationOptions`` checks it."""
    read = next((t for t in (int, float) if t is kind or t in get_args(kind)), str)

    def value(text: str) -> Any:
        try:
            return read(text)
        except ValueError:
            return text  # an old word, such as auto, which is refused by its new spelling

    return value


def _shown(kind: Any) -> str | None:
    return "{" + ",".join(get_args(kind)) + "}" if get_origin(kind) is Literal else None


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="PEFT folders, one per client")
    parser.add_argument("--reference", metavar="DIR", help="the adapter the clients started from (default: the heaviest's)")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per folder (default: all equal)")
    parser.add_argument(
        "--round", type=_parsed_as(int), default=0, help="the round's index, from 0: even rounds align B, odd rounds A"
    )
    _refuse_group(parser)
    parser.add_argument("--previous", help=argparse.SUPPRESS)


def _refuse_group(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--group", help=argparse.SUPPRESS)  # of fedrot 0.1; AggregationOptions names what replaces it
