"""The end of a round: from averages to the adapter that goes back to clients."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..adapters.checks import as_sent
from ..adapters.layout import Layout
from ..adapters.update import Update
from ..adapters.values import check_range
from ..methods.base import Method
from ..methods.round import Averages
from ..report.report import Report
from ..report.result import AggregationResult


@dataclass(frozen=True)
class AveragedRound:
    """A round whose clients have been averaged.

    Attributes:
        first: the first client, whose keys the result has; without tensors, where updates are not kept.
        layout: the layout of the result.
        reference: the adapter that the clients started from, or None if that is unknown.
        averages: their averages.
        report: the report.
        config: the configuration that the clients' own give the result, or None.
        counters: canonical key → what the result has of integers, which are not averaged.
        may_overflow: whether the averages have not been found finite.
    """

    first: Update
    layout: Layout
    reference: Update | None
    averages: Averages
    report: Report
    config: dict[str, Any] | None
    counters: dict[str, Tensor]
    may_overflow: bool


def factors_except(layout: Layout, kept: tuple[str, ...]) -> dict[str, None]:
    """The keys of all factors but those of ``kept``, "A" or "B", in the layout's order: the frozen or the personal ones."""
    if kept == ("A", "B"):
        return {}
    pairs = ((key, f) for keys in layout.factor_keys for key, f in zip(keys, "AB", strict=True))
    return {key: None for key, f in pairs if f not in kept}


def restore(round: AveragedRound, method: Method) -> dict[str, Tensor]:
    """The mean that goes back to clients, by canonical key: without personal factors, and frozen ones to the bit.

    Args:
        round: the averaged round.
        method: decides which factors clients train and which ones they keep.
    """
    layout = round.layout
    personal, frozen = (
        factors_except(layout, method.returns()),
        factors_except(layout, method.trains(round.report.round or 0)),
    )
    mean = {key: x for key, x in round.averages.mean.items() if key not in personal}
    if frozen and round.first.tensors:  # to the bit, not to the rounding of a mean of equals
        mean |= {key: as_sent((round.reference or round.first)[key], layout.specs[key]) for key in frozen}
    if round.averages.base is not None:  # what PEFT saves of a base would undo its change
        copies = round.first.storage.tied_modules
        changed = {f"{module}.base_layer.weight" for module in (*(a.module for a in layout.adapters), *copies)}
        mean = {key: x for key, x in mean.items() if key not in changed}
    return method.recast(mean, layout, round.report.round or 0)


def finish(
    round: AveragedRound, mean: dict[str, Tensor], method: Method, config: dict[str, Any] | None, *, check: bool
) -> AggregationResult:
    """The result of a round, under the first client's keys.

    Args:
        round: the averaged round.
        mean: what ``restore`` returned, or a server optimizer made of it.
        method: the method that averaged.
        config: the configuration of the federation's adapter.
        check: whether the mean may have overflowed its dtype.

    Raises:
        UpdateError: a result that overflowed.
    """
    base, first = round.averages.base, round.first
    state_dict = first.as_given(mean | round.counters)
    if check:
        check_range(state_dict | (base or {}), "the average,")
    own = round.config if method.unequal_ranks == "stack" else config
    personal = factors_except(round.layout, method.returns())
    base = None if base is None else first.storage.pack_factors(base)
    return AggregationResult(
        state_dict,
        round.report,
        method.options,
        own,
        base,
        None if base is None else first.storage.base_config(base, own or {}),
        tuple(
            given
            for key, given in (first.storage.saved.items() if personal else ())
            if not personal.keys().isdisjoint(first.storage.sources(key))
        ),
    )
