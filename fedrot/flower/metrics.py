"""The metrics of a round: what clients measured, averaged, and what aggregation did."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import MetricRecord, MetricRecordValues, RecordDict

from ..admission import one_line
from ..report.report import Report
from .replies import Reply

_log = logging.getLogger("flwr")


def average_metrics(
    replies: Sequence[Reply],
    weighted_by: str,
    average: Callable[[list[RecordDict], str], MetricRecord],
    ours: Mapping[str, float | int],
) -> dict[str, Any]:
    """Flower's average of the metrics that all clients sent, finite and alike, and the server's own.

    Args:
        replies: at least one.
        weighted_by: the metric that holds the number of examples.
        average: ``train_metrics_aggr_fn`` or ``evaluate_metrics_aggr_fn``; given what clients sent, without arrays.
        ours: of the server; clients' metrics of such names are left out.
    """
    sent = [reply.metrics[1] for reply in replies]
    kinds = Counter((key, _kind(value)) for metrics in sent for key, value in metrics.items())
    common = {key for (key, kind), n in kinds.items() if n == len(replies) and kind is not None}
    for key in sorted({key for key, _ in kinds} - common):
        _log.warning("metric %r is left out: not all clients sent a finite one", one_line(key))
    contents = []
    for reply in replies:
        record, metrics = reply.metrics
        shared = MetricRecord({key: value for key, value in metrics.items() if key in common})
        contents.append(RecordDict({**reply.content, record: shared}))
    theirs = dict(average(contents, weighted_by))
    for key in theirs.keys() & ours.keys():
        _log.warning("the clients' metric %r is left out: the server has one of that name", key)
    return {**theirs, **ours}


def measures(report: Report) -> dict[str, float | int]:
    """What an aggregation measured, under the names of metrics; without errors where there are none."""
    errors = {"aggregation-error": report.error, "relative-error": report.relative_error}
    return {key: x for key, x in errors.items() if x is not None} | {
        "rotation-angle": report.angle,
        "rotation-angle-max": max(angle for a in report.adapters for angle in a.angles),
        "clients": len(report.clients),
        "dropped": len(report.dropped),
    }


def _kind(value: MetricRecordValues) -> object:
    """What two values must have in common to be averaged; None where there is NaN or Inf."""
    values = value if isinstance(value, list) else [value]
    return (isinstance(value, list), len(values)) if all(map(math.isfinite, values)) else None
