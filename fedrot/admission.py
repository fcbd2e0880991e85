"""What a server asks of an update from outside before it enters an average, so that no client spoils the round of others."""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .adapters import Layout
from .errors import UpdateError
from .frozen import check_frozen
from .keys import factor_of
from .methods import Method
from .scaling import widest_layout
from .updates import Update, check_update, not_finite

# Above this no factor's products with another's are sure to fit into the dtype that they are computed in.
_LARGEST = {dtype: math.sqrt(torch.finfo(dtype).max) / 1e4 for dtype in (torch.float32, torch.float64)}


def admit(update: Update, expected: Update, method: Method, round: int, sent: Mapping[str, Tensor]) -> None:
    """Raise UpdateError unless an update can be averaged with others of the round.

    Args:
        update: the client's.
        expected: the whole adapter, as the server has it.
        method: decides whether ranks may differ and what clients train.
        round: from 0.
        sent: canonical key → what clients started from, at least the factors that they do not train.
    """
    if method.unequal_ranks:
        widest_layout([expected, update])
    else:
        check_update(update, expected, Layout(expected.specs, expected.name))
    if found := not_finite(update):
        raise UpdateError(f"{update.name}, {found}")
    factors = [key for key in update if factor_of(key)]
    for key in factors:
        x = update[key]
        largest, limit = float(x.abs().max()), _LARGEST[torch.promote_types(x.dtype, torch.float32)]
        if largest > limit:
            raise UpdateError(
                f"{update.name}, {key} {tuple(x.shape)}: holds {largest:.1e}, and products of such factors overflow; "
                "did training diverge?"
            )
    check_frozen(update, sent, [key for key in factors if factor_of(key) not in method.trains(round)], method.name)


def in_order(name: str) -> tuple[list[tuple[float, str]], str]:
    """A key to sort names by, "client 2" before "client 10": the order of an average, whatever order clients came in."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (math.inf, part) for part in parts], name
