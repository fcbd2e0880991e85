"""Clients' replies, opened and checked one by one, so that a wrong one is dropped and named, and no other with it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MetricRecord

from ..adapters.keys import parse_key
from ..adapters.update import Update, open_update
from ..admission import Admission, make_one_line, sort_key
from ..agreement import Digest, explain_difference, read_digest
from ..errors import UpdateError
from ..server.finish import factors_except
from .arrays import open_arrays
from .protocol import CLIENT, LORA, NAME

_LONGEST_NAME = 80
_MOST_EXAMPLES = 2**53  # whole numbers up to here are exact


@dataclass(frozen=True)
class Reply:
    """One client's reply that can be averaged.

    Attributes:
        name: the client's name in the log and in the report.
        content: the ConfigRecords that the client sent.
        metrics: the only MetricRecord that the client sent, and its key.
        weight: the client's number of examples.
        update: the client's adapter; None in an evaluation.
        digest: what the client's LoRA configuration makes factors mean, if the client said so.
    """

    name: str
    content: dict[str, ConfigRecord]
    metrics: tuple[str, MetricRecord]
    weight: float
    update: Update | None
    digest: Digest | None = None


class PendingReplies:
    """The nodes that a round's messages went to, and what became of them.

    Args:
        messages: the messages.
        names: node → the name that the client gave in an earlier reply; ``sort`` adds those of this round.
    """

    def __init__(self, messages: Sequence[Message], names: dict[int, str]):
        self._names = names
        self._metadata = [message.metadata for message in messages]

    @property
    def anyone(self) -> bool:
        """Whether a message was sent to any node."""
        return bool(self._metadata)

    def sort(self, replies: Iterable[Message]) -> tuple[list[tuple[str, Message]], dict[str, str]]:
        """Sort the replies of a round.

        Returns:
            (name, reply) of every client that replied with content, in the order of names; and name → why there is no reply
            of every other client.
        """
        nodes = {m.message_id: m.dst_node_id for m in self._metadata}
        failed: dict[int, str] = {}
        answered: dict[int, Message] = {}
        for message in replies:
            node = message.metadata.src_node_id
            if message.has_error():  # Flower itself answers for a node that is gone, with its own address
                node = nodes.get(message.metadata.reply_to_message_id, node)
                failed[node] = f"error {message.error.code}: {message.error.reason}"
            else:
                answered[node] = message
                if name := _read_name(message):
                    self._names[node] = name
        expected = {*nodes.values(), *answered, *failed}
        called = {node: self._names.get(node, f"node {node}") for node in expected}
        while twice := {name for name, n in Counter(called.values()).items() if n > 1}:
            called = {node: f"{name} (node {node})" if name in twice else name for node, name in called.items()}
        missing = {called[n]: failed.get(n, "no reply in time") for n in expected - answered.keys()}
        return sorted(((called[n], m) for n, m in answered.items()), key=lambda item: sort_key(item[0])), missing


def open_training_reply(weighted_by: str, admission: Admission, config: Digest | None, name: str, message: Message) -> Reply:
    """Open a client's reply to a training message, with what plays no part in the average filled in.

    Args:
        weighted_by: the metric that holds the number of examples.
        admission: what the round asks of updates.
        config: the digest of the LoRA configuration that the server knows, or None.
        name: the client's name.
        message: the client's reply. Its bytes stay the update's memory.

    Raises:
        UpdateError: a reply that cannot be averaged.
    """
    content, metrics, weight = _read_metrics(name, message, weighted_by)
    theirs = _read_lora(name, message)
    if theirs is not None and config is not None and (why := explain_difference(theirs, config, "the server")):
        raise UpdateError(f"{name} {why}")
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise UpdateError(f"{name} sent {len(records)} ArrayRecords; send one, the adapter")
    expected, method = admission.expected, admission.method
    tensors = open_arrays(records[0], name, expected.device)
    own = factors_except(admission.layout, method.returns())
    if own and (given := next((key for key in tensors if parse_key(key)[0] in own), None)):
        raise UpdateError(f"{name} sent {given}, a factor that {method.name} leaves with clients; keep it")
    # A personal factor is not averaged, but a layout consists of pairs.
    personal = expected.as_given({key: expected[key] for key in own}) if own else {}
    update = open_update(personal | tensors, name, expected, expected.config)
    admission.check(update)
    if update.specs is not expected.specs:
        # Under the server's keys and in their order, so that the keys of one client do not become those of all.
        update = open_update(expected.as_given(update), name, expected, expected.config)
    return Reply(name, content, metrics, weight, update, theirs)


def open_evaluation_reply(weighted_by: str, name: str, message: Message) -> Reply:
    """Open a client's reply to an evaluation message; see ``open_training_reply``.

    Raises:
        UpdateError: no usable number of examples.
    """
    return Reply(name, *_read_metrics(name, message, weighted_by), None)


def _read_metrics(
    name: str, message: Message, weighted_by: str
) -> tuple[dict[str, ConfigRecord], tuple[str, MetricRecord], float]:
    records = list(message.content.metric_records.items())
    if len(records) != 1:
        raise UpdateError(f"{name} sent {len(records)} MetricRecords; send one, with {weighted_by!r}")
    weight = records[0][1].get(weighted_by)
    if not isinstance(weight, int | float) or not 0 <= weight <= _MOST_EXAMPLES:
        raise UpdateError(f"{name} sent {weighted_by} = {weight!r} in its MetricRecord; send its number of examples")
    return dict(message.content.config_records), records[0], float(weight)


def _read_lora(name: str, message: Message) -> Digest | None:
    record = message.content.config_records.get(CLIENT, ConfigRecord())
    return read_digest(record[LORA], name) if LORA in record else None


def _read_name(message: Message) -> str | None:
    given = message.content.config_records.get(CLIENT, ConfigRecord()).get(NAME)
    if not isinstance(given, str):
        return None
    return make_one_line(given, _LONGEST_NAME) or None
