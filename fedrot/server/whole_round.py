"""A round whose updates are all at hand: bring them to one layout, average, measure."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..adapters.checks import carry, check_frozen
from ..adapters.update import Update, UpdateLike
from ..methods.base import Method
from ..methods.prepared import average_prepared
from ..methods.running_mean import shares_of
from ..ranks.padding import widest_client
from ..ranks.prepare import PreparedRound, prepare_round
from ..ranks.scaling import config_of_ranks
from ..report.measure import adapter_reports
from ..report.report import Report, is_unrotated, without_plain_errors
from ..robust.select import select_clients
from .finish import AveragedRound, factors_except


def average_whole(
    clients: Sequence[Update],
    weights: Sequence[float],
    method: Method,
    index: int,
    reference: UpdateLike | None,
    config: dict[str, Any] | None,
) -> AveragedRound:
    """Average the clients of a round, and measure what that loses.

    Args:
        clients: the clients, opened, at least one.
        weights: one per client, checked.
        method: the method.
        index: the round's index, from 0.
        reference: the adapter that the clients started from, or None.
        config: the reference's configuration, if the reference does not bring one.

    Raises:
        UpdateError: updates that cannot be averaged, by client, key and shapes.
    """
    options, averaging = method.options, method if reference is not None else method.without_reference()
    prepared = prepare_round(
        clients,
        weights,
        method.unequal_ranks,
        reference,
        config,
        whole=method.returns() == ("A", "B"),
        finite=averaging.needs_all,
        on_invalid=options.on_invalid,
    )
    prepared, choice = select_clients(prepared, options)
    prepared, averages = average_prepared(prepared, averaging, index)
    given, layout, first = prepared.given, prepared.layout, prepared.given[0]
    for client in given:
        check_frozen(client, prepared.reference or first, factors_except(layout, method.trains(index)), method.name)
    shares = shares_of(prepared.weights)
    adapters, deviation = adapter_reports(layout, averages, shares, options)
    if averaging.rescales:
        adapters = without_plain_errors(adapters)
    names = tuple(client.name for client in given)
    if choice is not None and choice.kept:  # the reference, which is the last of them, is no client
        names, shares = names[:-1], shares_of(shares[:-1])
        adapters = tuple(replace(a, angles=a.angles[:-1]) for a in adapters)
    target = None if is_unrotated(adapters) else averaging.target(index, _name_reference(prepared))
    report = Report(method.name, index, names, shares, prepared.dropped, adapters, target, deviation, choice)
    own_config = prepared.scalings.config if prepared.scalings else first.config
    if averages.ranks is not None and prepared.scalings is not None:
        ranks = {a.module: rank for a, rank in zip(layout.adapters, averages.ranks, strict=True)}
        own_config = config_of_ranks(prepared.scalings, ranks, first.storage.tied_modules)
    counters: dict[str, Tensor] = {}
    for client, weight in zip(given, prepared.weights, strict=True):
        counters = carry(counters, client, layout) if weight else counters
    return AveragedRound(first, layout, prepared.reference, averages, report, own_config, counters, not averages.sound)


def _name_reference(prepared: PreparedRound) -> str:
    """Words for the reference, or for the client whose update stands in for it."""
    if prepared.reference is not None:
        return "the reference"
    name = widest_client(prepared.clients, prepared.weights, prepared.layout).name
    return f"the update of {name}, because there is no reference"
