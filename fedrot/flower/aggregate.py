"""A round's replies and their aggregate: whoever spoils it is dropped, as long as enough clients are left."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from flwr.app import Message
from flwr.serverapp.exception import AggregationError

from ..admission import find_largest_entry, make_one_line
from ..agreement import find_unlike
from ..errors import UpdateError
from ..report.result import AggregationResult
from ..robust.rules import least_clients
from ..server.aggregator import FedRotAggregator
from .replies import PendingReplies, Reply

_log = logging.getLogger("flwr")


def open_replies(
    pending: PendingReplies, replies: Iterable[Message], open_reply: Callable[[str, Message], Reply], on_invalid: str
) -> tuple[list[Reply], dict[str, str]]:
    """Open the replies of a round.

    Args:
        pending: the messages that were sent.
        replies: what came back.
        open_reply: opens the reply of a client of some name; raises UpdateError for a wrong one.
        on_invalid: whether to "raise" that error or to "drop" the client.

    Returns:
        The good replies in the order of their names, and client → why there is none.

    Raises:
        UpdateError: a wrong reply, with ``on_invalid="raise"``.
    """
    answered, missing = pending.sort(replies)
    good, dropped = [], {name: make_one_line(why) for name, why in sorted(missing.items())}
    for name, message in answered:
        try:
            good.append(open_reply(name, message))
        except UpdateError as error:
            if on_invalid == "raise":
                raise
            dropped[name] = make_one_line(str(error).removeprefix(name).lstrip(" ,:"))
    return good, dropped


def aggregate_replies(
    aggregator: FedRotAggregator, good: list[Reply], dropped: dict[str, str], least: int
) -> AggregationResult:
    """Aggregate the good replies of a training round.

    Args:
        aggregator: at the round, with what clients were sent as its reference.
        good: the good replies. A client that makes the aggregate overflow, or whose LoRA configuration is another than that
            of most, is taken out and added to ``dropped``.
        dropped: client → why there is no good reply.
        least: how many replies with examples there must be.

    Returns:
        The result, whose report names everyone who was dropped.

    Raises:
        AggregationError: fewer replies are left.
        UpdateError: the aggregate overflows, with ``on_invalid="raise"``.
    """
    round = aggregator.round + 1
    _leave_out_unlike(good, dropped, aggregator.options.on_invalid)
    needed = max(least, least_clients(aggregator.options))
    while sum(reply.weight > 0 for reply in good) >= needed:
        updates = [reply.update for reply in good if reply.update is not None]
        try:
            result = aggregator.aggregate(updates, [reply.weight for reply in good])
        except UpdateError as error:  # each is sound by itself
            if aggregator.options.on_invalid == "raise":
                raise
            largest = max(range(len(good)), key=lambda i: find_largest_entry(updates[i]))
            dropped[good.pop(largest).name] = make_one_line(f"{error}; its entries were the largest")
        else:
            log_dropped(f"round {round}", dropped)
            for line in result.report.choice.lines() if result.report.choice is not None else ():
                _log.info("round %d: %s", round, line)
            return replace(result, report=replace(result.report, dropped=dropped))
    idle = name_idle(good)
    reasons = "".join(f"; {name}: {why}" for name, why in (dropped | idle).items())
    why = f"min_train_replies is {least}" if needed == least else f"robust={aggregator.options.robust!r} needs {needed}"
    raise AggregationError(f"round {round}: {len(good) - len(idle)} good answers with examples, but {why}{reasons}")


def _leave_out_unlike(good: list[Reply], dropped: dict[str, str], on_invalid: str) -> None:
    """Take out the clients whose LoRA configuration is not that of most, where the server knows none."""
    unlike = find_unlike({reply.name: reply.digest for reply in good if reply.digest is not None})
    if unlike and on_invalid == "raise":
        raise UpdateError(" ".join(next(iter(unlike.items()))))
    good[:] = [reply for reply in good if reply.name not in unlike]
    dropped |= {name: make_one_line(why) for name, why in unlike.items()}


def name_idle(good: list[Reply]) -> dict[str, str]:
    """Name the clients whose good replies count for nothing; return client → why."""
    return {reply.name: "its number of examples is 0; give it data, or leave it out" for reply in good if not reply.weight}


def log_dropped(when: str, dropped: dict[str, str]) -> None:
    """Log a line for every client without a good reply."""
    for name, why in dropped.items():
        _log.warning("%s: dropped %s: %s", when, name, why)
