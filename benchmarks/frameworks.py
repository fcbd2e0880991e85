"""Plain averaging as other frameworks do it, those that are installed."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from torch import Tensor

StateDict = Mapping[str, Tensor]


def others(updates: Sequence[StateDict], weights: Sequence[float]) -> dict[str, Callable[[], object]]:
    """Name → the average of the updates as each framework receives them; on a CPU, in dtypes that NumPy has."""
    example = next(iter(updates[0].values()))
    if example.device.type != "cpu" or not _has_numpy_dtype(example):
        return {}
    found: dict[str, Callable[[], object]] = {}
    if find_spec("flwr") is not None:
        from flwr.app import ArrayRecord, MetricRecord, RecordDict
        from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

        records = [
            RecordDict({"arrays": ArrayRecord(dict(update)), "metrics": MetricRecord({"num-examples": weight})})
            for update, weight in zip(updates, weights, strict=True)
        ]
        found["Flower's average"] = lambda: aggregate_arrayrecords(records, "num-examples")
    if find_spec("nvflare") is not None:
        from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

        arrays = [{key: x.numpy() for key, x in update.items()} for update in updates]

        def average() -> object:
            helper = WeightedAggregationHelper()
            for number, (update, weight) in enumerate(zip(arrays, weights, strict=True)):
                helper.add(update, weight, f"site-{number}", 0)
            return helper.get_result()

        found["NVFlare's average"] = average
    return found


def _has_numpy_dtype(x: Tensor) -> bool:
    try:
        x.numpy()
    except TypeError:
        return False
    return True
