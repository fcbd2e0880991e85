"""A round's answers, and their aggregate: whoever spoils it is dropped, as long as enough are left."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Message
from flwr.serverapp.exception import AggregationError

from ..adapters.update import StateDict, Update
from ..admission import largest_entry, one_line
from ..errors import UpdateError
from ..report.result import AggregationResult
from ..server.aggregator import FedRotAggregator, towards
from .replies import Asked, Reply

_log = logging.getLogger("flwr")


def open_all(
    asked: Asked, replies: Iterable[Message], open_reply: Callable[[str, Message], Reply], on_invalid: str
) -> tuple[list[Reply], dict[str, str]]:
    """The good answers, in the order of names, and client → why there is none.

    Raises:
        UpdateError: a wrong one, with ``on_invalid="raise"``.
    """
    answered, missing = asked.sort(replies)
    good, dropped = [], {name: one_line(why) for name, why in sorted(missing.items())}
    for name, message in answered:
        try:
            good.append(open_reply(name, message))
        except UpdateError as error:
            if on_invalid == "raise":
                raise
            dropped[name] = one_line(str(error).removeprefix(name).lstrip(" ,:"))
    return good, dropped


def aggregator_of(options: Mapping[str, Any], adapter: StateDict | None, round: int) -> FedRotAggregator:
    """The aggregator of one round, of clients that were sent an adapter.

    Args:
        options: of the strategy.
        adapter: what clients were sent.
        round: from 0.
    """
    others = {name: value for name, value in options.items() if name != "reference"}
    return FedRotAggregator(**towards(options["reference"], adapter), round=round, **others)


def aggregate_replies(
    good: list[Reply],
    dropped: dict[str, str],
    reference: Update,
    round: int,
    least: int,
    options: Mapping[str, Any],
    strengths: dict[str, float],
) -> AggregationResult:
    """The aggregate of a round's good answers.

    Args:
        good: answers; what makes the aggregate overflow is taken out, and added to ``dropped``.
        dropped: client → why it has no good answer.
        reference: what clients were sent.
        round: from 0.
        least: how many answers with examples there must be.
        options: of the strategy.
        strengths: module → λ of the last round, where it is chosen.

    Raises:
        AggregationError: fewer are left.
        UpdateError: the aggregate overflows, with ``on_invalid="raise"``.
    """
    while sum(reply.weight > 0 for reply in good) >= least:
        updates = [reply.update for reply in good if reply.update is not None]
        try:
            aggregator = aggregator_of(options, dict(reference), round)
            aggregator.strengths = strengths
            return aggregator.aggregate(updates, [reply.weight for reply in good])
        except UpdateError as error:  # each is sound by itself
            if options["on_invalid"] == "raise":
                raise
            largest = max(range(len(good)), key=lambda i: largest_entry(updates[i]))
            dropped[good.pop(largest).name] = one_line(f"{error}; its entries were the largest")
    reasons = "".join(f"; {name}: {why}" for name, why in dropped.items())
    raise AggregationError(
        f"round {round + 1}: {len(good)} good answers, but min_train_replies is {least}, with examples{reasons}"
    )


def log_dropped(when: str, dropped: dict[str, str]) -> None:
    """A line for every client without a good answer."""
    for name, why in dropped.items():
        _log.warning("%s: dropped %s: %s", when, name, why)
