"""A server that stops between two rounds and goes on from its saved state, to the bit."""

import io
from dataclasses import replace

import pytest
import torch

import fedrot
from fedrot import FedRotAggregator, ServerOptimizer
from fedrot.methods.registry import make_method
from fedrot.options import AggregationOptions

from ..definitions import assert_same_bits
from ..dense import KIND, UNEQUAL, lora_config, pairs
from ..peft_models import KINDS, client_updates, factor_keys, save_folder
from ..refusals import A, refused

ROUNDS = 4
CASES = {
    "fedrot": {},
    "momentum": {"server_optimizer": ("momentum", 0.7)},
    "adam": {"server_optimizer": ("adam", 0.05)},
    "configs": {"configs": lora_config(KIND)},
    "rolora": {"method": "rolora"},
    "rolora with adam": {"method": "rolora", "server_optimizer": ("adam", 0.05)},
    "ffa-lora": {"method": "ffa-lora"},
    "random-rotation": {"method": "random-rotation", "seed": 3},
    "flora": {"method": "flora", "configs": lora_config(KIND)},
    "fedrot-consensus": {"method": "fedrot-consensus"},
}


def started(reference=None, server_optimizer=None, **options):
    optimizer = None if server_optimizer is None else ServerOptimizer(*server_optimizer)
    return FedRotAggregator(reference, server_optimizer=optimizer, **options)


def trained(start, method, round):
    """Three clients' updates: the adapter that they start from, with noise on what the round trains."""
    factors = make_method(AggregationOptions(method=method)).trains(round)
    frozen = {key for pair in factor_keys(start) for key, f in zip(pair, "AB", strict=True) if f not in factors}
    generator = torch.Generator().manual_seed(round)
    return [
        {k: x if k in frozen else x + torch.randn(x.shape, generator=generator, dtype=x.dtype) for k, x in start.items()}
        for _ in range(3)
    ]


def run(aggregator, until=ROUNDS):
    """The rounds up to so many, and their results."""
    results = []
    while aggregator.round < until:
        clients = trained(aggregator.reference, aggregator.options.method, aggregator.round)
        results.append(aggregator.aggregate(clients, [1, 2, 5]))
    return results


def through_a_file(state):
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(results, others):
    assert results and len(results) == len(others)
    for result, other in zip(results, others, strict=True):
        assert_same_bits(result.state_dict, other.state_dict)
        assert result.report == other.report
        assert result.config == other.config and result.base_config == other.base_config


@pytest.mark.parametrize(("name", "stop"), [*((name, 2) for name in CASES), *(("rolora with adam", i) for i in (0, 1, 3))])
def test_a_restarted_server_goes_on_to_the_bit(name, stop):
    options = CASES[name]
    reference = client_updates(KIND, 1)[0]
    whole = run(started(reference, **options))
    before = started(reference, **options)
    run(before, stop)
    state = through_a_file(before.state_dict())
    after = started(**options)
    after.load_state_dict(state)
    assert (after.round, list(after.reference)) == (stop, list(reference))
    assert_same(run(after), whole[stop:])
    after.load_state_dict(state)  # which is as it was, and may be gone back to
    assert_same(run(after), whole[stop:])


@pytest.mark.parametrize("name", [None, "adam"])
def test_a_restarted_stream_goes_on_to_the_bit(name):
    options = {} if name is None else {"server_optimizer": (name, 0.1)}

    def streamed(aggregator):
        for client in trained(aggregator.reference, "fedrot", aggregator.round):
            aggregator.add(client)
        return aggregator.finish()

    server = started(client_updates(KIND, 1)[0], **options)
    streamed(server)
    again = started(**options)
    again.load_state_dict(through_a_file(server.state_dict()))
    assert_same([streamed(again), streamed(again)], [streamed(server), streamed(server)])


def test_half_precision_goes_on_from_what_the_optimizer_keeps_in_float32():
    reference = {key: torch.ones_like(x) for key, x in client_updates(KINDS["bfloat16"], 1)[0].items()}

    def step(aggregator):
        return aggregator.aggregate([{key: x + 1 for key, x in aggregator.reference.items()}])

    server = started(reference, ("adam", 1e-3), method="fedit")
    whole = [step(server) for _ in range(10)]
    again = started(reference, ("adam", 1e-3), method="fedit")
    parts = []
    for _ in range(10):  # a restart before every step, of which each is below what bfloat16 tells apart
        parts.append(step(again))
        state, again = through_a_file(again.state_dict()), started(None, ("adam", 1e-3), method="fedit")
        again.load_state_dict(state)
    assert_same(parts, whole)
    assert all(float(x.float().min()) > 1.005 for x in parts[-1].state_dict.values())


def test_the_configuration_comes_back_with_the_reference(tmp_path):
    """Without it the next round's clients of smaller ranks could not be scaled."""
    reference, clients = pairs([replace(KIND, config=KIND.config | {"r": 7, "lora_alpha": 6})])[0], pairs(UNEQUAL[:2])
    folder = save_folder(KIND, client_updates(KIND, 1)[0], tmp_path / "reference")
    for given in (reference, folder):
        server = FedRotAggregator(given)
        state = through_a_file(server.state_dict())
        again = FedRotAggregator()
        again.load_state_dict(state)
        assert state["config"]["r"] == (4 if given is folder else 7) and again.state_dict()["config"] == state["config"]
    server, again = FedRotAggregator(reference), FedRotAggregator()
    whole = [server.aggregate(clients) for _ in range(2)]
    again.load_state_dict(through_a_file(FedRotAggregator(reference).state_dict()))
    assert_same([again.aggregate(clients) for _ in range(2)], whole)


def test_a_server_that_knows_no_reference_yet_says_so():
    state = through_a_file(FedRotAggregator(round=3).state_dict())
    assert state == {"round": 3, "reference": None, "config": None, "server_optimizer": {}}
    again = FedRotAggregator(client_updates(KIND, 1)[0])
    again.load_state_dict(state)
    assert (again.round, again.reference) == (3, None)


@pytest.mark.parametrize("name", ["round", "reference", "config", "server_optimizer"])
def test_a_state_that_lacks_an_entry_is_refused(name):
    server = started(client_updates(KIND, 1)[0])
    state = server.state_dict()
    state.pop(name)
    with refused("the state lacks", name, "state_dict()", error=ValueError):
        started().load_state_dict(state)


@pytest.mark.parametrize("value", [-1, 1.5, None])
def test_a_state_of_no_round_is_refused(value):
    with refused("round", repr(value), error=ValueError):
        started().load_state_dict(started().state_dict() | {"round": value})


@pytest.mark.parametrize("value", [[1.0], "adapter"])
def test_a_state_whose_reference_is_no_adapter_is_refused_and_nothing_is_loaded(value):
    reference = client_updates(KIND, 1)[0]
    server = started(reference, ("adam", 0.1))
    run(server, 2)
    again = started(reference, ("adam", 0.1))
    with refused("the state's reference is", type(value).__name__, error=ValueError):
        again.load_state_dict(server.state_dict() | {"reference": value})
    assert again.state_dict()["server_optimizer"] == {} and again.round == 0


def test_the_state_of_another_optimizer_is_refused_and_nothing_is_loaded():
    reference = client_updates(KIND, 1)[0]
    server = started(reference, ("adam", 0.1))
    run(server, 2)
    state = server.state_dict()
    for other, named in ((("momentum", 0.1), "name momentum"), (None, "give this aggregator one too")):
        again = started(reference, other)
        with refused("server optimizer", named, error=ValueError):
            again.load_state_dict(state)
        assert again.round == 0 and torch.equal(again.reference[A], reference[A])


def test_a_round_under_way_is_neither_saved_nor_replaced():
    server = started(client_updates(KIND, 1)[0])
    state = server.state_dict()
    server.add(trained(server.reference, "fedrot", 0)[0])
    with refused("finish() that round", error=RuntimeError):
        server.state_dict()
    with refused("finish() that round", error=RuntimeError):
        server.load_state_dict(state)
    server.finish()
    assert server.state_dict()["round"] == 1
    server.load_state_dict(state)
    assert server.round == 0


def test_what_is_saved_is_what_a_fresh_process_reads():
    """Tensors, dictionaries, lists and plain numbers only: no class of fedrot, nor of anything that could run code."""
    server = started(client_updates(KIND, 1)[0], ("adam", 0.1), configs=lora_config(KIND))
    run(server, 1)
    kinds = set()

    def walk(value):
        kinds.add(type(value))
        for x in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(x)

    walk(server.state_dict())
    assert {dict, torch.Tensor} <= kinds <= {dict, list, torch.Tensor, str, int, float, bool, type(None)}
    assert fedrot.FedRotAggregator.state_dict.__doc__
