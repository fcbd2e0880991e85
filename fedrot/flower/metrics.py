"""A round's metrics: what clients measured, averaged, and what the aggregation did."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from flwr.app import MetricRecord, MetricRecordValues, RecordDict

from ..admission import make_one_line
from ..report.report import Report
from .replies import Reply

_log = logging.getLogger("flwr")


def average_metrics(
    replies: Sequence[Reply],
    weighted_by: str,
    average: Callable[[list[RecordDict], str], MetricRecord],
    ours: Mapping[str, float | int],
) -> MetricRecord:
    """Average the metrics that all clients sent, finite and alike, as Flower does, and add the server's own.

    Args:
        replies: at least one.
        weighted_by: the metric that holds the number of examples.
        average: ``train_metrics_aggr_fn`` or ``evaluate_metrics_aggr_fn``; it gets what clients sent, without arrays.
        ours: the server's own metrics; clients' metrics of such names are left out.
    """
    sent = [reply.metrics[1] for reply in replies]
    kinds = Counter((key, _describe_kind(value)) for metrics in sent for key, value in metrics.items())
    common = {key for (key, kind), n in kinds.items() if n == len(replies) and kind is not None}
    for key in sorted({key for key, _ in kinds} - common):
        _log.warning("metric %r is left out: not all clients sent a finite one", make_one_line(key))
    contents = []
    for reply in replies:
        record, metrics = reply.metrics
        shared = MetricRecord({key: value for key, value in metrics.items() if key in common})
        contents.append(RecordDict({**reply.content, record: shared}))
    theirs = dict(average(contents, weighted_by))
    for key in theirs.keys() & ours.keys():
        _log.warning("the clients' metric %r is left out: the server has one of that name", key)
    return MetricRecord({**theirs, **ours})


def extract_metrics(report: Report) -> dict[str, float | int]:
    """Extract what an aggregation measured, under the names of metrics; errors only if they were measured."""
    errors = {"aggregation-error": report.error, "relative-error": report.relative_error}
    errors["plain-relative-error"] = report.plain_relative_error
    choice = report.choice
    chosen = {} if choice is None else {"refused": len(choice.refused), "clipped": len(choice.clipped or {})}
    return (
        {key: x for key, x in errors.items() if x is not None}
        | chosen
        | {
            "rotation-angle": report.angle,
            "rotation-angle-max": max(angle for a in report.adapters for angle in a.angles),
            "clients": len(report.clients),
            "dropped": len(report.dropped),
        }
    )


def log_metrics(when: str, metrics: MetricRecord) -> None:
    """Log a round's metrics in one line, without those that are lists."""
    numbers = {key: value for key, value in metrics.items() if not isinstance(value, list)}
    _log.info("%s: %s", when, ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))


def _describe_kind(value: MetricRecordValues) -> object:
    """Describe what two values must have in common to be averaged; None for a value with NaN or Inf."""
    values = value if isinstance(value, list) else [value]
    return (isinstance(value, list), len(values)) if all(map(math.isfinite, values)) else None
