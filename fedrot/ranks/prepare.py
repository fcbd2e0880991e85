"""A round's clients in one layout: opened by the adapters' room, and padded where a method pads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapters.common import UnequalRanks, start_round
from ..adapters.layout import Layout
from ..adapters.update import Update, UpdateLike
from ..adapters.values import valid_clients
from ..options import OnInvalid
from .padding import pad
from .scaling import Scalings, round_scalings


@dataclass(frozen=True)
class PreparedRound:
    """The clients of a round, ready for a method.

    Attributes:
        given: the clients as they came.
        positions: client → its place among all that sent something, from 0.
        clients: the same clients in the layout's ranks and the result's scaling, if the method pads.
        weights: one per client.
        layout: the layout of the result.
        reference: the adapter that the clients started from, or None if that is unknown.
        scalings: the scalings of clients and result; None where they play no part.
        unequal_ranks: whether ranks and scalings may differ.
        dropped: client → the reason why it was left out.
    """

    given: Sequence[Update]
    positions: Mapping[str, int]
    clients: Sequence[Update]
    weights: Sequence[float]
    layout: Layout
    reference: Update | None
    scalings: Scalings | None
    unequal_ranks: UnequalRanks
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def is_padded(self) -> bool:
        """Whether factors are not in the layout's dtypes, or have rows that are no client's own."""
        return self.unequal_ranks == "pad" and (self.scalings is not None or any(client.ranks for client in self.clients))


def prepare_round(
    clients: Sequence[Update],
    weights: Sequence[float],
    unequal_ranks: UnequalRanks,
    reference: UpdateLike | None,
    config: dict[str, Any] | None,
    *,
    whole: bool,
    finite: bool,
    on_invalid: OnInvalid,
) -> PreparedRound:
    """Bring the clients of a round to one layout.

    Args:
        clients: the clients, opened, at least one.
        weights: one per client, checked.
        unequal_ranks, reference, config, whole: as for ``start_round``.
        finite: whether inputs must be checked for NaN first. Gram-space methods would spread a NaN or hide it, as padding
            does.
        on_invalid: whether a client with NaN is an error or left out.

    Raises:
        UpdateError: clients that cannot be averaged, or another reference than theirs.
    """
    dropped: dict[str, str] = {}
    positions = {client.name: place for place, client in enumerate(clients)}
    layout, opened = start_round(clients, unequal_ranks, reference, config, whole=whole)
    s = round_scalings(clients, layout, opened, unequal_ranks)
    if finite or (unequal_ranks == "pad" and s is not None):
        clients, weights = valid_clients(clients, weights, on_invalid, dropped)
        if dropped:
            layout, opened = start_round(clients, unequal_ranks, reference, config, whole=whole)
            s = round_scalings(clients, layout, opened, unequal_ranks)
    padded = pad_all(clients, layout, s, unequal_ranks)
    return PreparedRound(clients, positions, padded, weights, layout, opened, s, unequal_ranks, dropped)


def drop_invalid(round: PreparedRound, on_invalid: OnInvalid) -> PreparedRound:
    """The round without clients that hold NaN or Inf; the round itself if there is none.

    Raises:
        UpdateError: there is one, with ``on_invalid="raise"``, or none of positive weight is left.
    """
    dropped = dict(round.dropped)
    clients, weights = valid_clients(round.given, round.weights, on_invalid, dropped)
    if len(clients) == len(round.given):
        return round
    s = round_scalings(clients, round.layout, round.reference, round.unequal_ranks)
    padded = pad_all(clients, round.layout, s, round.unequal_ranks)
    return replace(round, given=clients, clients=padded, weights=weights, scalings=s, dropped=dropped)


def pad_all(clients: Sequence[Update], layout: Layout, s: Scalings | None, unequal_ranks: UnequalRanks) -> list[Update]:
    """The clients in the layout's ranks and the result's scaling, if the method pads and they have others."""
    if s is None or unequal_ranks != "pad":
        return list(clients)
    return [pad(c, layout, s_client, s.result) for c, s_client in zip(clients, s.per_client, strict=True)]
