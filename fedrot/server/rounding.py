"""Rounding."""

from collections.abc import Sequence
from dataclasses import replace

from ..adapters.layout import Layout
from ..adapters.update import Update
from ..methods.round import Averages
from ..ranks.padding import own_rows, trainable


def rounded(averages: "Averages", layout: Layout, clients: Sequence[Update], reference: Update | None) -> "Averages":
    """The averages of padded clients in the layout's dtypes, and rotations with rows of zero where a client has none; see
    ``trainable`` for the reference."""
    mean = {key: x.to(layout.specs[key].dtype) for key, x in averages.mean.items()}
    if reference is not None:
        mean = trainable(mean, layout, reference)
    R = averages.R
    if R is not None:
        R = [x * own_rows(a, clients).to(x.device) for a, x in zip(layout.adapters, R, strict=True)]
    return replace(averages, mean=mean, R=R)
