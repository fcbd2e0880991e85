"""Replies that a client spoils in tests, and a federation in which one client does."""

from flwr.app import MetricRecord

from fedrot.adapters.keys import factor_of
from fedrot.flower import FedRot, from_arrays, to_arrays

from ..peft_models import KINDS
from .local_grid import LocalGrid, client_app
from .strategy_runs import start_of

KIND = KINDS["modules to save"]
KEY = next(key for key in start_of(KIND) if factor_of(key) == "A")
HEAD = "base_model.model.classifier.weight"


def changed(change):
    """A reply whose tensors are changed by a function from state dict to state dict."""

    def spoil(message):
        message.content["arrays"] = to_arrays(change(from_arrays(message.content["arrays"])))

    return spoil


def with_entry(key, value):
    def change(state):
        state[key].view(-1)[1] = value
        return state

    return changed(change)


def metrics(**values):
    def spoil(message):
        message.content["metrics"] = MetricRecord({key.replace("_", "-"): x for key, x in values.items()})

    return spoil


def run(spoil, rounds=1, **options):
    grid = LocalGrid({0: client_app(KIND), 1: client_app(KIND, spoil=spoil), 2: client_app(KIND)})
    strategy = FedRot(fraction_evaluate=0.0, **options)
    return strategy.start(grid, to_arrays(start_of(KIND)), num_rounds=rounds), strategy
