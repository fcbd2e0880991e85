"""A federation's rounds on Flower, and those of the aggregator alone with the same training."""

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedrot import METHODS, FedRotAggregator, fold
from fedrot.adapters.keys import factor_of
from fedrot.flower import FedRot, to_arrays

from ..peft_models import KINDS
from .local_grid import LocalGrid, client_app, fresh_model, train

KIND = KINDS["linear"]
ROUNDS, CLIENTS = 3, 3
WEIGHTS = [1.0, 2.0, 3.0]


def start_of(kind):
    """An adapter whose B is not zero, as after a round, so that the first aggregation has something to align with."""
    model = fresh_model(kind)
    train(model, 77, 0)
    return {key: x.clone() for key, x in get_peft_model_state_dict(model).items()}


def in_process(kind, rounds=ROUNDS, **options):
    """Every round's start and result of the aggregator alone, with the same training, and the folded model."""
    aggregator = FedRotAggregator(start_of(kind), **options)
    model, state, own = fresh_model(kind), start_of(kind), {}
    results = []
    for round in range(rounds):
        trained, updates = aggregator.method.trains(round), []
        for client in range(CLIENTS):
            mine = {key: state.get(key, own.get((client, key))) for key in get_peft_model_state_dict(model)}
            set_peft_model_state_dict(model, mine)
            for name, p in model.named_parameters():
                if factor_of(name):
                    p.requires_grad_(factor_of(name) in trained)
            train(model, client, round + 1)
            updates.append({key: x.clone() for key, x in get_peft_model_state_dict(model).items()})
        result = aggregator.aggregate(updates, WEIGHTS)
        own = {(c, key): updates[c][key] for c in range(CLIENTS) for key in result.personal}
        fold(model, result)
        state = result.state_dict
        results.append(result)
    return results, model


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(x.dtype == expected[key].dtype and torch.equal(x, expected[key]) for key, x in found.items())


def on_flower(kind, rounds=ROUNDS, strategy=None, arrival=0, **options):
    strategy = strategy or FedRot(fraction_evaluate=0.0, **options)
    grid = LocalGrid({c: client_app(kind) for c in range(CLIENTS)}, arrival)
    return strategy.start(grid, to_arrays(start_of(kind)), num_rounds=rounds), strategy


def configs(kind):
    return fresh_model(kind).peft_config["default"]


def options_of(method, kind):
    stacks = METHODS[method].unequal_ranks == "stack"
    return {"method": method, "configs": configs(kind)} if stacks else {"method": method}
