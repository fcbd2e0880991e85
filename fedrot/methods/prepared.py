"""Averaging a round that has been brought to one layout; only if that fails, the clients that spoil it are looked for."""

from dataclasses import replace

from ..ranks.collapse import check_ranks_configured
from ..ranks.padding import rank_mask, revive_dead_ranks, widest_client
from ..ranks.prepare import PreparedRound, drop_invalid
from .base import Method
from .collapse import undo_collapse
from .rotation import check_rotations
from .round import Averages, Round


def average_prepared(prepared: PreparedRound, method: Method, index: int) -> tuple[PreparedRound, Averages]:
    """Average the clients of a round.

    Args:
        prepared: the round.
        method: the method.
        index: the round's index, from 0.

    Returns:
        The round without the clients that had to be left out, and the averages of the others.

    Raises:
        UpdateError: a layout that the method cannot average, a client that holds NaN or Inf (``on_invalid="raise"``), or
            factors whose products overflow.
    """
    method.check(prepared.layout)
    if method.options.collapse == "raflora":
        check_ranks_configured(prepared.given)
    averages = _average(prepared, method, index)
    if not averages.sound:
        kept = drop_invalid(prepared, method.options.on_invalid)
        if kept is not prepared:
            prepared, averages = kept, _average(kept, method, index)
        if averages.residual is not None:
            check_rotations(averages.residual, prepared.layout.adapters, [client.name for client in prepared.given])
    return prepared, averages


def _average(prepared: PreparedRound, method: Method, index: int) -> Averages:
    """Average towards the reference given, or else the client of the largest weight among the widest."""
    clients, weights, layout = prepared.clients, prepared.weights, prepared.layout
    reference = prepared.reference or widest_client(clients, weights, layout)
    positions = [prepared.positions[client.name] for client in clients]
    averages = method.aggregate(Round(index, layout, clients, positions, weights, reference, prepared.scalings))
    if method.options.collapse == "raflora" and prepared.is_padded:
        averages = undo_collapse(averages, prepared, measure=bool(method.options.report_error))
    return _round_padded(averages, prepared) if prepared.is_padded else averages


def _round_padded(averages: Averages, prepared: PreparedRound) -> Averages:
    """Round averages of padded clients to the layout's dtypes, and zero the rows of rotations that are no client's own.

    With a reference, ranks that no client has are revived: see ``revive_dead_ranks``.
    """
    layout, reference = prepared.layout, prepared.reference
    mean = {key: x.to(layout.specs[key].dtype) for key, x in averages.mean.items()}
    if reference is not None:
        mean = revive_dead_ranks(mean, layout, reference)
    R = averages.R
    if R is not None:
        R = [x * rank_mask(a, prepared.clients).to(x.device) for a, x in zip(layout.adapters, R, strict=True)]
    return replace(averages, mean=mean, R=R, angles=None)
