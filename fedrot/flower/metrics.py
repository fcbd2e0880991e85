"""The metrics of a round: what clients measured, averaged, and what aggregation did."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from flwr.app import MetricRecord, MetricRecordValues, RecordDict

from ..report import Report
from .replies import Reply


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
