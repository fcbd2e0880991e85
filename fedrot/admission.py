"""Admission of updates from outside: what an update must be before it enters an average with others."""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .adapters.checks import check_frozen, check_update
from .adapters.layout import Layout
from .adapters.update import Update
from .errors import UpdateError
from .methods.base import Method
from .server.finish import factors_except

# Larger than any entry of a model; products and squares of such values begin to overflow float32.
_LARGEST = 1e15
# Characters in a log of one client's text, or of one error about a client.
_LONGEST = 500


class Admission:
    """What a round asks of every update.

    Args:
        expected: the whole adapter, as the server has it.
        method: decides what clients train.
        round: the round's index, from 0.
        sent: canonical key → what clients started from, at least for the factors that they do not train.

    Attributes:
        expected, method: as given.
        layout: the layout of ``expected``.
    """

    def __init__(self, expected: Update, method: Method, round: int, sent: Mapping[str, Tensor]):
        self.expected, self.method, self._sent = expected, method, sent
        self.layout = Layout(expected.specs, expected.name)
        self._frozen = factors_except(self.layout, method.trains(round))

    def check(self, update: Update) -> None:
        """Raise UpdateError unless an update can be averaged with others of the round."""
        check_update(update, self.expected, self.layout)
        keys = [key for key, spec in update.specs.items() if spec.dtype.is_floating_point]
        # No entry is larger than its tensor's norm, NaN makes the norm NaN, and amax keeps NaN. Norms take less time than
        # extremes. Rounding is far from a factor of two.
        norms = torch.stack(torch._foreach_norm([update[key] for key in keys]))
        if not float(norms.amax()) <= _LARGEST / 2:
            self._check_each(update, keys)
        check_frozen(update, self._sent, [key for key in update if key in self._frozen], self.method.name)

    def _check_each(self, update: Update, keys: Sequence[str]) -> None:
        for key, largest in zip(keys, _find_extremes(update, keys), strict=True):
            what = f"{update.name}, {key} {update.specs[key].shape}"
            if not math.isfinite(largest):
                raise UpdateError(f"{what} holds NaN or Inf; did training diverge?")
            if largest > _LARGEST:
                raise UpdateError(f"{what}: holds {largest:.1e}; did training diverge?")


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
