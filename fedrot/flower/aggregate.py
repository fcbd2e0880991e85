"""A round's answers, and their aggregate: whoever spoils it is dropped, as long as enough are left."""

import logging
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.serverapp.exception import AggregationError

from ..admission import largest_entry, one_line
from ..errors import UpdateError
from ..report.result import AggregationResult
from ..server.aggregator import FedRotAggregator
from .replies import PendingReplies, Reply

_log = logging.getLogger("flwr")


def open_all(
    pending: PendingReplies, replies: Iterable[Message], open_reply: Callable[[str, Message], Reply], on_invalid: str
) -> tuple[list[Reply], dict[str, str]]:
    """The good answers, in the order of names, and client → why there is none.

    Raises:
        UpdateError: a wrong one, with ``on_invalid="raise"``.
    """
    answered, missing = pending.sort(replies)
    good, dropped = [], {name: one_line(why) for name, why in sorted(missing.items())}
    for name, message in answered:
        try:
            good.append(open_reply(name, message))
        except UpdateError as error:
            if on_invalid == "raise":
                raise
            dropped[name] = one_line(str(error).removeprefix(name).lstrip(" ,:"))
    return good, dropped


def aggregate_replies(
    good: list[Reply], dropped: dict[str, str], aggregator: FedRotAggregator, least: int
) -> AggregationResult:
    """Aggregate a round's good answers.

    Args:
        good: answers; what makes the aggregate overflow is taken out, and added to ``dropped``.
        dropped: client → why it has no good answer.
        aggregator: at the round, with what clients were sent as its reference.
        least: how many answers with examples there must be.

    Raises:
        AggregationError: fewer are left.
        UpdateError: the aggregate overflows, with ``on_invalid="raise"``.
    """
    while sum(reply.weight > 0 for reply in good) >= least:
        updates = [reply.update for reply in good if reply.update is not None]
        try:
            return aggregator.aggregate(updates, [reply.weight for reply in good])
        except UpdateError as error:  # each is sound by itself
            if aggregator.options.on_invalid == "raise":
                raise
            largest = max(range(len(good)), key=lambda i: largest_entry(updates[i]))
            dropped[good.pop(largest).name] = one_line(f"{error}; its entries were the largest")
    reasons = "".join(f"; {name}: {why}" for name, why in dropped.items())
    raise AggregationError(
        f"round {aggregator.round + 1}: {len(good)} good answers, but min_train_replies is {least}, with examples{reasons}"
    )


def log_dropped(when: str, dropped: dict[str, str]) -> None:
    """A line for every client without a good answer."""
    for name, why in dropped.items():
        _log.warning("%s: dropped %s: %s", when, name, why)
