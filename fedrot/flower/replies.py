"""What clients answered: opened and checked one by one, so that a wrong one is dropped and named, and no other with it."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MetricRecord

from ..admission import admit, in_order
from ..errors import UpdateError
from ..keys import factor_of
from ..methods import Method
from ..updates import StateDict, Update, open_update
from .arrays import from_arrays
from .settings import CLIENT, NAME

_LONGEST_NAME = 80


@dataclass(frozen=True)
class Reply:
    """One client's answer that can be averaged.

    Attributes:
        name: how the log and the report call the client.
        metrics: as it sent them.
        weight: its number of examples.
        update: its adapter; None in an evaluation.
    """

    name: str
    metrics: MetricRecord
    weight: float
    update: Update | None


class Asked:
    """The nodes that a round's messages went to, and what became of them.

    Attributes:
        names: node → the name that the client gave in an earlier reply, from round to round.
    """

    def __init__(self, messages: Sequence[Message], names: dict[int, str]):
        self.names = names
        self._metadata = [message.metadata for message in messages]

    @property
    def anyone(self) -> bool:
        """Whether there were any."""
        return bool(self._metadata)

    def sort(self, replies: Iterable[Message]) -> tuple[list[tuple[str, Message]], dict[str, str]]:
        """Replies with content by client, in the order of names, and why there is none of the others."""
        nodes = {m.message_id: m.dst_node_id for m in self._metadata}
        failed: dict[int, str] = {}
        answered: dict[int, Message] = {}
        for message in replies:
            # Flower itself answers for a node that is gone, with its own address.
            node = nodes.get(message.metadata.reply_to_message_id, message.metadata.src_node_id)
            if message.has_error():
                failed[node] = f"error {message.error.code}: {message.error.reason}"
            else:
                answered[node] = message
                if name := _name(message):
                    self.names[node] = name
        expected = {*nodes.values(), *answered, *failed}
        shared = Counter(self.names[node] for node in expected if node in self.names)

        def called(node: int) -> str:
            name = self.names.get(node)
            if name is None:
                return f"node {node}"
            return name if shared[name] == 1 else f"{name} (node {node})"

        missing = {called(n): failed.get(n, "no reply in time") for n in sorted(expected - answered.keys(), key=called)}
        return sorted(((called(n), m) for n, m in answered.items()), key=lambda item: in_order(item[0])), missing


def open_training_reply(
    name: str, message: Message, weighted_by: str, expected: Update, method: Method, round: int, sent: StateDict
) -> Reply:
    """A client's update, with what plays no part in its average filled in.

    Args:
        name: of the client.
        message: its reply.
        weighted_by: the metric that holds the number of examples.
        expected: the whole adapter, as the server has it.
        method: decides whether ranks may differ, what clients train and which factors they keep to themselves.
        round: from 0.
        sent: canonical key → what clients started from.

    Raises:
        UpdateError: what cannot be averaged.
    """
    metrics, weight = _metrics(name, message, weighted_by)
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise UpdateError(f"{name} sent {len(records)} ArrayRecords; send one, the adapter")
    tensors = from_arrays(records[0], name, expected.device)
    personal = {key for key in expected if factor_of(key) not in (None, *method.returns())}
    # What stays with clients is not averaged; the layout wants pairs.
    update = open_update({expected.keys_given[key]: expected[key] for key in personal} | tensors, name)
    admit(update, expected, method, round, sent)
    return Reply(name, metrics, weight, update)


def open_evaluation_reply(name: str, message: Message, weighted_by: str) -> Reply:
    """A client's metrics.

    Raises:
        UpdateError: no usable number of examples.
    """
    return Reply(name, *_metrics(name, message, weighted_by), None)


def _metrics(name: str, message: Message, weighted_by: str) -> tuple[MetricRecord, float]:
    records = list(message.content.metric_records.values())
    if len(records) != 1:
        raise UpdateError(f"{name} sent {len(records)} MetricRecords; send one, with {weighted_by!r}")
    weight = records[0].get(weighted_by)
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise UpdateError(f"{name} sent {weighted_by} = {weight!r} in its MetricRecord; send its number of examples")
    return records[0], float(weight)


def _name(message: Message) -> str | None:
    given = message.content.config_records.get(CLIENT, ConfigRecord()).get(NAME)
    if not isinstance(given, str):
        return None
    # One line, of bounded length: it goes into the server's log.
    return " ".join("".join(c if c.isprintable() else " " for c in given).split())[:_LONGEST_NAME] or None
