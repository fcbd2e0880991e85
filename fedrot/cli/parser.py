"""The parser of the command line, but for the simulator's options."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from fedrot_kernels import backends

from ..merging.merge import MergeMethod
from ..merging.saved import ModulesToSave
from ..methods.registry import METHODS
from ..options import AggregationOptions, ReportError
from ..version import __version__

SIMULATOR = MappingProxyType(
    {"simulate": "run a federation in this process", "compare": "simulate several methods over several seeds"}
)
ROTATING = tuple(name for name, method in METHODS.items() if "reflections" in method.uses)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of everything but the simulator's options; ``command`` of what it parses names the command."""
    parser = argparse.ArgumentParser(prog="fedrot", description="Federated averaging of LoRA adapters in a common basis.")
    kernels = ", ".join(f"{name} {state}" for name, state in backends().items())
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__} ({kernels})")
    commands = parser.add_subparsers(required=True, dest="command", metavar="command")
    for name, text in SIMULATOR.items():
        commands.add_parser(name, help=text)
    _add_aggregate(commands.add_parser("aggregate", help="merge the adapters of one round into one"))
    _add_merge(commands.add_parser("merge", help="merge adapters that were trained independently into one"))
    _add_inspect(commands.add_parser("inspect", help="show what averaging adapters loses, as they are and rotated"))
    commands.add_parser("methods", help="show what each method communicates, costs and loses")
    return parser


def _add_aggregate(parser: argparse.ArgumentParser) -> None:
    _add_clients(parser)
    _add_output(parser)
    _add_options(parser)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="PEFT folders of one base, of any ranks and modules")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="one per folder, negative to subtract it; they are divided by their sum (default: all equal)",
    )
    parser.add_argument(
        "--normalize",
        choices=("yes", "no"),
        default="yes",
        help="no adds the adapters as they are weighted: --weights 1 -1 --normalize no is their difference (default: yes)",
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="of every module (default: in each the adapters' largest); flexlora loses nothing at the sum of their ranks",
    )
    parser.add_argument("--alpha", type=float, metavar="α", help="its lora_alpha (default: the adapters' most frequent)")
    parser.add_argument(
        "--method",
        default=get_args(MergeMethod)[0],
        type=_parse_merge_method,
        metavar=_show_choices(MergeMethod),
        help="flexlora: the best adapter of the rank; fedrot-least-error: rotate so that averaging loses least, and "
        "average, which loses more and ends in the basis of one adapter (default: %(default)s)",
    )
    _add_options(parser, "reflections")
    parser.add_argument(
        "--modules-to-save",
        choices=get_args(ModulesToSave),
        default=get_args(ModulesToSave)[0],
        help="heads and whatever else is no LoRA factor: their mean, the first adapter's, or none (default: %(default)s)",
    )
    parser.add_argument("--base", metavar="DIR", help="the base model, whose head stands for one that an adapter lacks")
    parser.add_argument(
        "--rename",
        action="append",
        type=_parse_renaming,
        metavar="FROM=TO",
        help="what names of modules begin with, for adapters of unlike versions of a model; none if names are right",
    )
    _add_old_options(parser, "--group")
    written = parser.add_mutually_exclusive_group(required=True)
    written.add_argument("--dry-run", action="store_true", help="print what each method loses by rank, and write nothing")
    written.add_argument("--output", metavar="DIR", help="a new folder for the merged adapter and its report")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_clients(parser)
    parser.add_argument(
        "--method", default="fedrot", choices=ROTATING, metavar="NAME", help=f"{', '.join(ROTATING)} (default: %(default)s)"
    )
    _add_options(parser, "align_on", "strength", "reflections", "backend", "seed")


def _add_clients(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="PEFT folders, one per client")
    parser.add_argument(
        "--reference",
        metavar="DIR",
        help="the adapter the clients started from (without one, fedrot takes the clients' consensus)",
    )
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per folder (default: all equal)")
    parser.add_argument(
        "--round",
        type=_parse_as(int),
        default=0,
        metavar="N",
        help="the round's index, from 0: even rounds align B, odd rounds A (default: %(default)s)",
    )
    _add_old_options(parser, "--group", "--previous")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder for the merged adapter and its report")


def _add_old_options(parser: argparse.ArgumentParser, *flags: str) -> None:
    """Add options of fedrot 0.1, hidden, for ``refuse_old_spellings`` to refuse by what replaces them."""
    for flag in flags:
        parser.add_argument(flag, help=argparse.SUPPRESS)


def _add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the fields of ``AggregationOptions``, or those of these names, as options of the command line."""
    for f in fields(AggregationOptions):
        if names and f.name not in names:
            continue
        flag, default = "--" + f.name.replace("_", "-"), "" if f.default is None else " (default: %(default)s)"
        settings: dict[str, Any] = {"default": f.default, "help": f.metadata["help"].replace("%", "%%") + default}
        if f.type in (bool, ReportError):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        elif f.name == "method":
            settings["help"] += "; fedrot methods lists them"
            parser.add_argument(flag, choices=METHODS, metavar="NAME", **settings)
        else:
            parser.add_argument(flag, type=_parse_as(f.type), metavar=_show_choices(f.type), **settings)


def _parse_as(kind: Any) -> Callable[[str], Any]:
    """Make a function that reads a value as the first number type of an annotation, or leaves it as it is.

    ``AggregationOptions`` checks values, so that its errors name what replaces an old word, such as auto.
    """
    read = next((t for t in (int, float) if t is kind or t in get_args(kind)), str)

    def parse(text: str) -> Any:
        try:
            return read(text)
        except ValueError:
            return text

    return parse


def _parse_renaming(text: str) -> tuple[str, str] | None:
    if text == "none":
        return None
    old, equals, new = text.partition("=")
    if not equals or not (old or new):
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM=TO, such as model.language_model=model, nor none")
    return old, new


def _parse_merge_method(text: str) -> str:
    if text in (*get_args(MergeMethod), "fedrot"):  # merge says what replaces fedrot
        return text
    raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(get_args(MergeMethod))})")


def _show_choices(kind: Any) -> str | None:
    return "{" + ",".join(get_args(kind)) + "}" if get_origin(kind) is Literal else None
