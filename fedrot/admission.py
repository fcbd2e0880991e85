"""Admission of updates from outside: what an update must be before it enters an average with others."""

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

# Larger than any entry of a model; products and squares of such values begin to overflow float32.
_LARGEST = 1e15
# Characters in a log of one client's text, or of one error about a client.
_LONGEST = 500


def admit(update: Update, expected: Update, method: Method, round: int, sent: Mapping[str, Tensor]) -> None:
    """Raise UpdateError unless an update can be averaged with others of the round.

    Args:
        update: the client's update.
        expected: the whole adapter, as the server has it.
        method: decides what clients train.
        round: the round's index, from 0.
        sent: canonical key → what clients started from, at least for the factors that they do not train.
    """
    check_update(update, expected, Layout(expected.specs, expected.name))
    keys = [key for key, x in update.items() if x.is_floating_point()]
    for key, largest in zip(keys, _find_extremes(update, keys), strict=True):
        if not math.isfinite(largest):
            raise UpdateError(f"{update.name}, {key} {update.specs[key].shape} holds NaN or Inf; did training diverge?")
        if largest > _LARGEST:
            raise UpdateError(f"{update.name}, {key} {update.specs[key].shape}: holds {largest:.1e}; did training diverge?")
    frozen = [key for key in update if factor_of(key) not in (None, *method.trains(round))]
    check_frozen(update, sent, frozen, method.name)


def find_largest_entry(update: Update) -> float:
    """Find the largest absolute value of an update; 0 for an update without entries."""
    return max(_find_extremes(update, [key for key, x in update.items() if x.is_floating_point()]), default=0.0)


def _find_extremes(update: Update, keys: Sequence[str]) -> list[float]:
    """Find the largest absolute value of each tensor: NaN for a tensor that holds NaN. One synchronisation with a device."""
    if not keys:
        return []
    low, high = zip(*(torch.aminmax(update[key]) for key in keys), strict=True)
    extremes = torch.stack([x.double() for x in (*low, *high)]).view(2, -1)
    largest: list[float] = extremes.abs().amax(0).tolist()
    return largest


def make_one_line(text: str, longest: int = _LONGEST) -> str:
    """Make text from outside fit for one line of a log.

    Args:
        text: anything.
        longest: the most characters to return.

    Returns:
        The printable characters, without terminal colours and runs of white space. A longer text is cut to its beginning
        and its end, where an exception's message usually is.
    """
    if len(text) > 4 * longest:
        text = text[: 2 * longest] + text[-2 * longest :]
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    line = " ".join("".join(c if c.isprintable() else " " for c in plain).split())
    return line if len(line) <= longest else f"{line[: longest // 3]} … {line[3 + longest // 3 - longest :]}"


def sort_key(name: str) -> tuple[list[tuple[float, str]], str]:
    """Make a key that sorts "client 2" before "client 10".

    Averages sum clients in the order of their names, so that a result does not depend on the order of arrival.
    """
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (math.inf, part) for part in parts], name
