"""What a server asks of an update from outside before it enters an average, so that no client spoils the round of others."""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .adapters.checks import check_frozen, check_update
from .adapters.keys import factor_of
from .adapters.layout import Layout
from .adapters.update import Update
from .errors import UpdateError
from .methods.base import Method

# Beyond any tensor of a model; products and squares of such values begin to overflow float32.
_LARGEST = 1e15
# Of what a client says or is said of it, in a log.
_LONGEST = 500


def admit(update: Update, expected: Update, method: Method, round: int, sent: Mapping[str, Tensor]) -> None:
    """Raise UpdateError unless an update can be averaged with others of the round.

    Args:
        update: the client's.
        expected: the whole adapter, as the server has it.
        method: decides what clients train.
        round: from 0.
        sent: canonical key → what clients started from, at least the factors that they do not train.
    """
    check_update(update, expected, Layout(expected.specs, expected.name))
    keys = [key for key, x in update.items() if x.numel()]
    for key, largest in zip(keys, _largest_entries(update, keys), strict=True):
        if not math.isfinite(largest):
            raise UpdateError(f"{update.name}, {key} {update.specs[key].shape} holds NaN or Inf; did training diverge?")
        if largest > _LARGEST:
            raise UpdateError(f"{update.name}, {key} {update.specs[key].shape}: holds {largest:.1e}; did training diverge?")
    frozen = [key for key in update if factor_of(key) not in (None, *method.trains(round))]
    check_frozen(update, sent, frozen, method.name)


def largest_entry(update: Update) -> float:
    """The largest absolute value of an update."""
    return max(_largest_entries(update, [key for key, x in update.items() if x.numel()]))


def _largest_entries(update: Update, keys: Sequence[str]) -> list[float]:
    """Of each tensor the largest absolute value; NaN where it holds one. One synchronisation with a device."""
    low, high = zip(*(torch.aminmax(update[key]) for key in keys), strict=True)
    extremes = torch.stack([x.double() for x in (*low, *high)]).view(2, -1)
    return extremes.abs().amax(0).tolist()


def one_line(text: str, longest: int = _LONGEST) -> str:
    """What came from outside, fit for a line of a log: printable, and where it is too long its beginning and its end."""
    if len(text) > 4 * longest:
        text = text[: 2 * longest] + text[-2 * longest :]
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    line = " ".join("".join(c if c.isprintable() else " " for c in plain).split())
    return line if len(line) <= longest else f"{line[: longest // 3]} … {line[3 + longest // 3 - longest :]}"


def in_order(name: str) -> tuple[list[tuple[float, str]], str]:
    """A key to sort names by, "client 2" before "client 10": the order of an average, whatever order clients came in."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (math.inf, part) for part in parts], name
