"""A round whose updates are all at hand: validate, bring to one layout, average, measure."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..adapters.checks import check_frozen
from ..adapters.layout import Layout
from ..adapters.update import Update, UpdateLike
from ..methods.rotation import check_rotations
from ..methods.round import Averages, Round
from ..methods.running_mean import shares_of
from ..ranks.padding import rank_mask, revive_dead_ranks, widest_client
from ..ranks.scaling import Scalings
from ..report.measure import adapter_reports
from ..report.report import Report
from .finish import AveragedRound, factors_except
from .validation import RoundValidator


def average_whole(
    clients: Sequence[Update],
    weights: Sequence[float],
    validator: RoundValidator,
    index: int,
    reference: UpdateLike | None,
    config: dict[str, Any] | None,
) -> AveragedRound:
    """Validate and average the clients of a round.

    Args:
        clients: at least one, opened.
        weights: one per client, checked.
        validator: of the method.
        index: the round's index, from 0.
        reference: the adapter that the clients started from, or None.
        config: the reference's configuration, if the reference does not bring one.

    Raises:
        UpdateError: updates that cannot be averaged, by client, key and shapes.
    """
    method, dropped = validator.method, dict[str, str]()
    positions = {client.name: position for position, client in enumerate(clients)}
    given, layout = validator.start(reference, config, clients)
    s = validator.scalings(clients, layout, given)
    if validator.needs_finite_inputs(s):
        clients, weights = validator.valid(clients, weights, dropped)
        if dropped:
            given, layout = validator.start(reference, config, clients)
            s = validator.scalings(clients, layout, given)

    def average() -> Averages:
        return _average(clients, weights, validator, index, layout, given, s, positions)

    averages = average()
    if not averages.sound:  # only then look for what is wrong
        kept, kept_weights = validator.valid(clients, weights, dropped)
        if len(kept) < len(clients):
            clients, weights = kept, kept_weights
            s = validator.scalings(clients, layout, given)
            averages = average()
        if averages.residual is not None:
            check_rotations(averages.residual, layout.adapters, [client.name for client in clients])
    for client in clients:
        check_frozen(client, given or clients[0], factors_except(layout, method.trains(index)), method.name)
    used, shares = tuple(client.name for client in clients), shares_of(weights)
    adapters = adapter_reports(layout, averages, shares, method.options.report_error)
    report = Report(method.name, index, used, shares, dropped, adapters)
    own_config = s.config if s else clients[0].config
    return AveragedRound(clients[0], layout, given, averages, report, own_config, not averages.sound)


def _average(
    clients: Sequence[Update],
    weights: Sequence[float],
    validator: RoundValidator,
    index: int,
    layout: Layout,
    given: Update | None,
    s: Scalings | None,
    positions: dict[str, int],
) -> Averages:
    """Average towards the reference given, or else the client of the largest weight among the widest."""
    clients = validator.pad(clients, layout, s)
    reference = given or widest_client(clients, weights, layout)
    where = [positions[client.name] for client in clients]
    averages = validator.method.aggregate(Round(index, layout, clients, where, weights, reference, s))
    padded = validator.method.unequal_ranks == "pad" and (s is not None or any(client.ranks for client in clients))
    return _round_padded(averages, layout, clients, given) if padded else averages


def _round_padded(averages: Averages, layout: Layout, clients: Sequence[Update], reference: Update | None) -> Averages:
    """Round averages of padded clients to the layout's dtypes, and zero the rows of rotations that are no client's own.

    With a reference, ranks that no client has are revived: see ``revive_dead_ranks``.
    """
    mean = {key: x.to(layout.specs[key].dtype) for key, x in averages.mean.items()}
    if reference is not None:
        mean = revive_dead_ranks(mean, layout, reference)
    R = averages.R
    if R is not None:
        R = [x * rank_mask(a, clients).to(x.device) for a, x in zip(layout.adapters, R, strict=True)]
    return replace(averages, mean=mean, R=R)
