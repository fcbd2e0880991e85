"""A round whose updates are added one by one: begin it, validate and add each client, merge what others added, average."""

import os
from typing import Any

from torch import Tensor

from ..adapters.checks import as_sent, carry, check_frozen
from ..adapters.common import check_next, start_round
from ..adapters.update import Update, UpdateLike, is_name, open_client, read_configs
from ..adapters.values import is_valid, nothing_left
from ..errors import UpdateError
from ..methods.base import Method
from ..methods.round import Averages
from ..methods.running_mean import shares_of
from ..ranks.padding import pad, revive_dead_ranks
from ..ranks.scaling import round_scalings
from ..report.report import Report, is_unrotated, without_plain_errors
from .finish import AveragedRound, factors_except
from .partial import PartialAggregate, check_mergeable, compatibility
from .stream import StreamedRound


def check_streams(method: Method, name: str | None, *, merges: bool = False) -> None:
    """Raise ValueError unless the method can add updates one by one, or merge their sums, under such a name."""
    if method.needs_all:
        given = "" if method.options.collapse == "none" else f" with collapse={method.options.collapse!r}"
        raise ValueError(f"{method.name}{given} needs all updates of a round at once: aggregate(updates)")
    if method.options.compares_clients:
        given = f"robust={method.options.robust!r}" if method.options.robust != "none" else f"clip={method.options.clip!r}"
        raise ValueError(f"{given} compares all updates of a round, which a stream does not keep: aggregate(updates)")
    if merges and method.draws_per_client:
        raise ValueError(
            f"{method.name} draws for every client by its number in the round, which two servers would give twice: "
            "add all clients to one aggregator"
        )
    if name is not None and not is_name(name):
        raise ValueError(f"name must be a line of text, got {name!r}")


def begin_stream(
    first: Update, method: Method, index: int, reference: UpdateLike | None, config: dict[str, Any] | None
) -> StreamedRound:
    """Begin a round of updates that are added one by one.

    Args:
        first: the first client, or a partial aggregate's; it is not added yet.
        method: the method.
        index: the round's index, from 0.
        reference: the adapter that the clients started from, or None.
        config: the reference's configuration, if the reference does not bring one.

    Raises:
        UpdateError: the method needs a reference, and there is none.
    """
    options = method.options
    if reference is None and method.needs_reference(index):
        raise UpdateError(
            "updates that are added one by one need a reference; pass the adapter that the clients started from, "
            "or aggregate(updates) the first round at once"
        )
    whole = method.returns() == ("A", "B")
    layout, target = start_round([first], method.unequal_ranks, reference, config, whole=whole)
    method.check(layout)
    seed = options.seed if options.report_error else None
    return StreamedRound(first, layout, target, seed, method.alignment(index))


def open_next(streamed: StreamedRound | None, update: UpdateLike, name: str | None, configs: Any) -> Update:
    """Open one client's update, with the configuration of bare state dicts.

    Raises:
        UpdateError: not an update, or a client of that name is in the round already.
    """
    called = name or f"client {streamed.seen if streamed else 0}"
    first = streamed.first if streamed is not None else None
    client = open_client(update, called, first, read_configs(configs, [called])[0])
    if streamed is not None and (client.name in streamed.weights or client.name in streamed.dropped):
        raise UpdateError(f"{client.name} is in this round already; give every client a name of its own")
    return client


def add_client(streamed: StreamedRound, client: Update, weight: float, method: Method, index: int) -> None:
    """Validate one client and add its share to the sums; nothing else of the client is kept.

    Raises:
        UpdateError: an update that cannot be averaged; the round is as before.
    """
    layout = streamed.layout
    check_next(client, streamed.first, layout, streamed.reference, method.unequal_ranks)
    finite = streamed.look(client)
    if not finite and not is_valid(client, method.options.on_invalid, streamed.dropped):
        return
    if not streamed.weights:
        streamed.frozen = untrained_factors(streamed, client, method, index)
    check_frozen(client, streamed.frozen, streamed.frozen, method.name)
    counters = carry(streamed.counters, client, layout) if weight else streamed.counters
    if method.unequal_ranks == "pad" and not streamed.has_layout(client):
        s = round_scalings([streamed.first, client], layout, streamed.reference, method.unequal_ranks)
        if s is not None:
            client, finite = pad(client, layout, s.per_client[1], s.result), None
    if finite:
        streamed.add_looked_at(client.name, weight)
    else:
        streamed.add(client.name, weight, *method.prepare(index, client, streamed.seen, layout, streamed.reference))
    streamed.counters = counters


def untrained_factors(streamed: StreamedRound, first: Update, method: Method, index: int) -> dict[str, Tensor]:
    """The factors that no client of the round trains: those that all must have started from."""
    start, frozen = streamed.reference or first, factors_except(streamed.layout, method.trains(index))
    return {key: as_sent(start[key], streamed.layout.specs[key]) for key in frozen}


def merge_clients(
    streamed: StreamedRound | None,
    partial: PartialAggregate | str | os.PathLike[str],
    method: Method,
    index: int,
    reference: UpdateLike | None,
    config: dict[str, Any] | None,
) -> StreamedRound:
    """Add the clients that another server has added to a round, which they may begin.

    Raises:
        UpdateError: see ``FedRotAggregator.merge``; the round is as before.
    """
    partial = partial if isinstance(partial, PartialAggregate) else PartialAggregate.load(partial)
    theirs = partial.first
    streamed = streamed or begin_stream(theirs, method, index, reference, config)
    check_mergeable(partial, compatibility(method, index, streamed), streamed)
    if partial.stream.weights:
        expected = streamed.frozen if streamed.weights else untrained_factors(streamed, theirs, method, index)
        check_frozen(theirs, expected, expected, method.name)
    streamed.merge(partial.stream)
    return streamed


def average_stream(streamed: StreamedRound, method: Method, index: int) -> AveragedRound:
    """Average the clients that were added, of which the report estimates the aggregation error.

    Raises:
        UpdateError: no client of positive weight was added.
    """
    if not any(streamed.weights.values()):
        raise nothing_left(streamed.dropped)
    layout = streamed.layout
    shares = shares_of(tuple(streamed.weights.values()))
    found = streamed.average()
    adapters, deviation = streamed.adapter_reports(found.estimates)
    if method.rescales:
        adapters = without_plain_errors(adapters)
    target = None if is_unrotated(adapters) else method.target(index, "the reference")
    report = Report(method.name, index, tuple(streamed.weights), shares, streamed.dropped, adapters, target, deviation)
    mean = found.mean | streamed.frozen
    if method.unequal_ranks == "pad" and streamed.reference is not None:
        mean = revive_dead_ranks(mean, layout, streamed.reference, found.dead)
    s = round_scalings([streamed.first], layout, streamed.reference, method.unequal_ranks)
    config = s.config if s else streamed.first.config
    averages = Averages(mean, [], [], None, None, False)
    counters = streamed.counters
    overflows = not found.is_finite
    return AveragedRound(streamed.first, layout, streamed.reference, averages, report, config, counters, overflows)
