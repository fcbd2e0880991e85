"""Clients, trees of servers and bounds that the tests of streams share."""

from dataclasses import replace

import torch

from fedrot import METHODS, FedRotAggregator
from fedrot.methods.registry import make_method
from fedrot.options import AggregationOptions

from .definitions import assert_same_bits
from .dense import with_frozen
from .peft_models import KINDS, turned_clients

KIND = KINDS["modules to save"]
# Of the adapters in a row the first and the third are of one shape.
MIXED = replace(KIND, config={"target_modules": ["query", "key", "value"], "rank_pattern": {"key": 2}})
WEIGHTS = [1.0, 2.0, 4.5, 0.3, 7.0, 1e-3, 3.0]
NEEDS_ALL = [name for name in METHODS if make_method(AggregationOptions(method=name)).needs_all]
STREAMING = [name for name in METHODS if name not in NEEDS_ALL]
MERGING = [name for name in STREAMING if METHODS[name].supports_server_optimizer]
TREES = {  # whose leaves are clients; a list is a server
    "two servers": [[0, 1, 2], [3, 4, 5, 6]],
    "one client each": [[0], [1], [2], [3], [4], [5], [6]],
    "a server with clients of its own": [0, 1, [2, 3], 4, [5, 6]],
    "three levels, out of order": [[[5, 1], [4]], [[0, 2], [6, [3]]]],
}


def inputs(method, kind=KIND):
    reference, clients = turned_clients(kind, len(WEIGHTS))
    for factor in set("AB") - set(make_method(AggregationOptions(method=method)).trains(1)):
        clients = with_frozen(clients, factor)
        reference = clients[0]
    return reference, clients


def started(reference, **options):
    return FedRotAggregator(reference, **{"round": 1} | options)


def added(aggregator, clients, numbers, weights=WEIGHTS):
    for i in numbers:
        aggregator.add(clients[i], weights[i], f"client {i}")
    return aggregator


def grown(tree, reference, clients, through=lambda partial: partial, **options):
    """The aggregator at the root, after its clients and its servers'."""
    aggregator = started(reference, **options)
    for node in tree:
        if isinstance(node, int):
            added(aggregator, clients, [node])
        else:
            aggregator.merge(through(grown(node, reference, clients, through, **options).partial()))
    return aggregator


def assert_same(result, other):
    assert_same_bits(result.state_dict, other.state_dict)
    assert result.report == other.report


def assert_within_rounding(state_dict, reference, clients, additions, method, kind=KIND):
    """Of Σ wᵢ x̃ᵢ / Σ wᵢ in float64, x̃ᵢ being what a client alone contributes, after so many additions in a row."""
    alone = [added(started(reference, method=method), clients, [i]).finish().state_dict for i in range(len(clients))]
    u = torch.finfo(kind.dtype).eps / 2
    assert state_dict.keys() == alone[0].keys() and state_dict
    for key, x in state_dict.items():
        terms = [w / sum(WEIGHTS) * c[key].double() for w, c in zip(WEIGHTS, alone, strict=True)]
        # Weights are rounded once, each sum once and the quotient once, and the sums of a server when they are rescaled.
        bound = (2 * additions + 3) * u * sum(term.abs() for term in terms)
        assert ((x.double() - sum(terms)).abs() <= bound).all(), key
