"""What clients answered: opened and checked one by one, so that a wrong one is dropped and named, and no other with it."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, MetricRecordValues, RecordDict

from ..adapters import Layout
from ..errors import UpdateError
from ..frozen import check_frozen
from ..keys import factor_of
from ..methods import Method
from ..scaling import widest_layout
from ..updates import StateDict, Update, check_update, not_finite, open_update
from .arrays import from_arrays
from .settings import CLIENT, NAME

# Above this no factor's products with another's are sure to fit into the dtype that they are computed in.
_LARGEST = {dtype: math.sqrt(torch.finfo(dtype).max) / 1e4 for dtype in (torch.float32, torch.float64)}
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
        return sorted(((called(n), m) for n, m in answered.items()), key=lambda item: _in_order(item[0])), missing


def open_training_reply(
    name: str, message: Message, weighted_by: str, expected: Update, method: Method, frozen: StateDict
) -> Reply:
    """A client's update, checked against the adapter that the server knows.

    Args:
        name: of the client.
        message: its reply.
        weighted_by: the metric that holds the number of examples.
        expected: the whole adapter, as the server has it.
        method: decides whether ranks may differ, and which factors clients keep to themselves.
        frozen: the factors that clients do not train this round, as they were sent.

    Raises:
        UpdateError: what cannot be averaged.
    """
    metrics, weight = _metrics(name, message, weighted_by)
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise UpdateError(f"{name} sent {len(records)} ArrayRecords; send one, the adapter")
    update = _open(name, records[0], expected, method)
    if method.unequal_ranks:
        widest_layout([expected, update])
    else:
        check_update(update, expected, Layout(expected.specs, expected.name))
    if found := not_finite(update):
        raise UpdateError(f"{name}, {found}")
    _check_size(update)
    check_frozen(update, frozen, frozen, method.name)
    return Reply(name, metrics, weight, update)


def _open(name: str, arrays: ArrayRecord, expected: Update, method: Method) -> Update:
    tensors = from_arrays(arrays, name, expected.device)
    personal = {key for key in expected if factor_of(key) not in (None, *method.returns())}
    # What stays with clients plays no part in the mean; the layout wants pairs.
    return open_update({expected.keys_given[key]: expected[key] for key in personal} | tensors, name)


def open_evaluation_reply(name: str, message: Message, weighted_by: str) -> Reply:
    """A client's metrics.

    Raises:
        UpdateError: no usable number of examples.
    """
    return Reply(name, *_metrics(name, message, weighted_by), None)


def average_metrics(
    replies: Sequence[Reply],
    weighted_by: str,
    average: Callable[[list[RecordDict], str], MetricRecord],
    on_left_out: Callable[[str], object],
) -> MetricRecord:
    """Flower's average of the metrics that all clients sent, finite and alike.

    Args:
        replies: at least one.
        weighted_by: the metric that holds the number of examples.
        average: ``train_metrics_aggr_fn`` or ``evaluate_metrics_aggr_fn``.
        on_left_out: told the name of every metric that not all have.
    """
    kinds = Counter((key, _kind(value)) for reply in replies for key, value in reply.metrics.items())
    common = {key for (key, kind), n in kinds.items() if n == len(replies) and kind is not None}
    for key in sorted({key for key, _ in kinds} - common):
        on_left_out(key)
    contents = [{key: value for key, value in reply.metrics.items() if key in common} for reply in replies]
    return average([RecordDict({"metrics": MetricRecord(content)}) for content in contents], weighted_by)


def _metrics(name: str, message: Message, weighted_by: str) -> tuple[MetricRecord, float]:
    records = list(message.content.metric_records.values())
    if len(records) != 1:
        raise UpdateError(f"{name} sent {len(records)} MetricRecords; send one, with {weighted_by!r}")
    weight = records[0].get(weighted_by)
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise UpdateError(f"{name} sent {weighted_by} = {weight!r} in its MetricRecord; send its number of examples")
    return records[0], float(weight)


def _check_size(update: Update) -> None:
    for key in update:
        if factor_of(key):
            x = update[key]
            largest, limit = float(x.abs().max()), _LARGEST[torch.promote_types(x.dtype, torch.float32)]
            if largest > limit:
                raise UpdateError(
                    f"{update.name}, {key} {tuple(x.shape)}: holds {largest:.1e}, and products of such factors overflow; "
                    "did training diverge?"
                )


def _name(message: Message) -> str | None:
    given = message.content.config_records.get(CLIENT, ConfigRecord()).get(NAME)
    if not isinstance(given, str):
        return None
    # One line, of bounded length: it goes into the server's log.
    return " ".join("".join(c if c.isprintable() else " " for c in given).split())[:_LONGEST_NAME] or None


def _in_order(name: str) -> list:
    """ "client 2" before "client 10"."""
    return [(int(part), "") if part.isdecimal() else (math.inf, part) for part in re.split(r"(\d+)", name)]


def _kind(value: MetricRecordValues) -> object:
    """What two values must have in common to be averaged; None where there is NaN or Inf."""
    values = value if isinstance(value, list) else [value]
    return (isinstance(value, list), len(values)) if all(map(math.isfinite, values)) else None
