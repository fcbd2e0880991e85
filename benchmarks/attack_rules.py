"""Rules against attackers: Flower's own on raw factors, and ours on the distances of updates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.server.strategy.aggregate import aggregate_median
from flwr.serverapp.strategy.multikrum import select_multikrum
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

import fedrot
from fedrot.options import KRUM

State = dict[str, Tensor]


class Aggregated(NamedTuple):
    """The next global adapter, and the weights that clients had in it; None where a rule has no weights."""

    state: State
    weights: list[float] | None


@dataclass(frozen=True)
class Replies:
    """What a rule aggregates.

    Attributes:
        states: the adapters that clients sent, one each.
        start: the adapter that they started from.
        round: the round's index, from 0.
        attackers: f, how many attackers the rule is told of.
        lora: the LoRA configuration.
    """

    states: Sequence[State]
    start: State
    round: int
    attackers: int
    lora: object


Rule = Callable[[Replies], Aggregated]


def _flower_krum(*, several: bool) -> Rule:
    def aggregate(replies: Replies) -> Aggregated:
        n = len(replies.states)
        metrics = MetricRecord({"num-examples": 1})
        contents = [RecordDict({"arrays": ArrayRecord(dict(x)), "metrics": metrics}) for x in replies.states]
        chosen = select_multikrum(contents, replies.attackers, n - replies.attackers if several else 1)
        places = [next(i for i, content in enumerate(contents) if content is one) for one in chosen]
        mean = aggregate_arrayrecords(chosen, "num-examples").to_torch_state_dict()
        return Aggregated(dict(mean), [1 / len(places) if i in places else 0.0 for i in range(n)])

    return aggregate


def _flower_median(replies: Replies) -> Aggregated:
    arrays = aggregate_median([([x.numpy() for x in state.values()], 1) for state in replies.states])
    return Aggregated({name: torch.from_numpy(np.asarray(x)) for name, x in zip(replies.start, arrays, strict=True)}, None)


def _ours(**options: Any) -> Rule:
    def aggregate(replies: Replies) -> Aggregated:
        given = options | ({"byzantine": replies.attackers} if options.get("robust") in KRUM else {})
        result = fedrot.aggregate(
            replies.states,
            reference=replies.start,
            round=replies.round,
            configs=replies.lora,
            report_error=False,
            **given,
        )
        choice = result.report.choice
        return Aggregated(result.state_dict, list(result.report.weights if choice is None else choice.weights))

    return aggregate


RULES: Mapping[str, Rule] = {
    "FedIT": _ours(method="fedit"),
    "Flower's Krum": _flower_krum(several=False),
    "Flower's MultiKrum": _flower_krum(several=True),
    "Flower's median": _flower_median,
    "FlexLoRA": _ours(method="flexlora"),
    "krum": _ours(method="flexlora", robust="krum"),
    "multi-krum": _ours(method="flexlora", robust="multi-krum"),
    "geometric-median": _ours(method="flexlora", robust="geometric-median"),
    "clip": _ours(method="flexlora", clip="median"),
}
"""Name → rule. Ours average with FlexLoRA, whose result is that of the mean update, in whatever bases clients are."""
