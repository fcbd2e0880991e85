"""Updates added in any order and merged in any tree: the batch's result."""

import gc
import itertools
import math
from dataclasses import replace

import pytest
import torch

import fedrot
from fedrot import FedRotAggregator, PartialAggregate
from fedrot.adapters.config import plain_config
from fedrot.server import compiled
from fedrot_kernels.native_backend.library import instruction_set
from fedrot_kernels.sketch import SKETCH_SIZE as SIZE

from ..definitions import assert_same_bits
from ..dense import UNEQUAL, lora_config
from ..peft_models import KINDS, client_updates, factor_keys
from ..refusals import A, refused
from ..streams import (
    KIND,
    MERGING,
    MIXED,
    TREES,
    WEIGHTS,
    added,
    assert_same,
    assert_within_rounding,
    grown,
    inputs,
    started,
)


@pytest.mark.parametrize("kind", [KINDS[name] for name in ("modules to save", "convolution", "float64", "DoRA")])
@pytest.mark.parametrize("method", ["fedrot", "fedit", "scalar"])
def test_any_order_gives_the_same_mean(kind, method):
    reference, clients = inputs(method, kind)
    for order in ([0, 1, 2, 3, 4, 5, 6], [5, 3, 0, 6, 2, 1, 4], [6, 5, 4, 3, 2, 1, 0]):
        result = added(started(reference, method=method), clients, order).finish()
        assert_within_rounding(result.state_dict, reference, clients, len(clients), method, kind)
        again = added(started(reference, method=method), clients, order).finish()
        assert_same(again, result)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("method", MERGING)
def test_any_tree_of_servers_is_the_batch(method, tree):
    reference, clients = inputs(method)
    result = grown(tree, reference, clients, method=method).finish()
    assert_within_rounding(result.state_dict, reference, clients, len(clients) + 3, method)
    at_once = fedrot.aggregate(clients, WEIGHTS, reference, method=method, round=1)
    assert result.state_dict.keys() == at_once.state_dict.keys() and result.personal == at_once.personal
    assert result.state_dict
    for key, x in at_once.state_dict.items():
        torch.testing.assert_close(result.state_dict[key], x, rtol=2e-6, atol=2e-6 * float(x.abs().max()))
    report, whole = result.report, at_once.report
    of_clients = dict(zip(report.clients, report.weights, strict=True))
    assert of_clients == pytest.approx(dict(zip(whole.clients, whole.weights, strict=True)), rel=1e-12)
    for merged, exact in zip(report.adapters, whole.adapters, strict=True):
        angles = dict(zip(report.clients, merged.angles, strict=True))
        assert angles == pytest.approx(dict(zip(whole.clients, exact.angles, strict=True)), abs=1e-2)
    assert_same(grown(tree, reference, clients, method=method).finish(), result)


@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e13, 1e60])
def test_servers_whose_weights_differ_by_magnitudes_merge(scale):
    """Both ways round; each server counts with its share, however its weights compare with the first of the other's."""
    reference, clients = inputs("fedit")
    weights = [w * (scale if i > 2 else 1.0) for i, w in enumerate(WEIGHTS)]
    truth = {
        key: sum(w / sum(weights) * c[key].double() for w, c in zip(weights, clients, strict=True)) for key in reference
    }
    for tree in ([0, 1, 2, [3, 4, 5, 6]], [3, 4, 5, 6, [0, 1, 2]], [[3, 4], [0, 1, 2], [5, 6]]):
        root = started(reference, method="fedit")
        for node in tree:
            if isinstance(node, int):
                added(root, clients, [node], weights)
            else:
                root.merge(added(started(reference, method="fedit"), clients, node, weights).partial())
        result = root.finish()
        assert sum(result.report.weights) == pytest.approx(1)
        for key, x in truth.items():
            bound = 24 * torch.finfo(torch.float32).eps * max(c[key].abs().max() for c in clients)
            assert (result.state_dict[key] - x).abs().max() <= bound, key


@pytest.mark.parametrize("method", ["fedrot", "rolora", "fedsa-lora"])
@pytest.mark.parametrize("kind", [KIND, KINDS["bfloat16"], MIXED], ids=["float32", "bfloat16", "mixed ranks"])
def test_a_file_keeps_every_bit(tmp_path, kind, method):
    reference, clients = inputs(method, kind)
    numbers = itertools.count()

    def through_a_file(partial):
        partial.save(path := tmp_path / f"{next(numbers)}.safetensors")
        return path

    tree = TREES["three levels, out of order"]
    expected = grown(tree, reference, clients, method=method).finish()
    assert_same(grown(tree, reference, clients, through_a_file, method=method).finish(), expected)
    assert len(list(tmp_path.iterdir())) == next(numbers)  # and nothing temporary


def test_a_partial_aggregation_says_whose_it_is_and_may_be_used_again(tmp_path):
    reference, clients = inputs("fedrot")
    partial = added(started(reference), clients, [0, 1]).partial("north")
    assert partial.clients == ("north/client 0", "north/client 1") and partial.weights == (1.0, 2.0) and not partial.dropped
    results = []
    for _ in range(2):
        root = added(started(reference), clients, [2])
        root.merge(partial)
        added(root, clients, [3])
        results.append(root.finish())
    assert_same(*results)
    partial.save(tmp_path / "north")
    with pytest.raises(FileExistsError):
        partial.save(tmp_path / "north")
    assert PartialAggregate.load(tmp_path / "north").clients == partial.clients


def test_a_server_goes_on_after_it_handed_its_part_on():
    reference, clients = inputs("fedrot")
    edge, root = started(reference), started(reference)
    for _ in range(2):
        root.merge(added(edge, clients, [0, 1]).partial("north"))
        root.merge(added(edge, clients, [0, 1]).partial("south"))
        result = root.finish()
        edge.reference, edge.round = result.state_dict, root.round
    assert result.report.clients == ("north/client 0", "north/client 1", "south/client 0", "south/client 1")
    assert result.report.round == 2


def test_keys_in_another_order_are_the_same_keys():
    reference, clients = inputs("fedrot", MIXED)
    expected = grown([[0, 1], [2, 3]], reference, clients).finish()
    backwards = [dict(reversed(c.items())) for c in clients]
    root = started(reference)
    root.merge(added(started(reference), clients, [0, 1]).partial())
    root.merge(added(started(dict(reversed(reference.items()))), backwards, [2, 3]).partial())
    result = root.finish()
    torch.testing.assert_close(dict(result.state_dict), dict(expected.state_dict), rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(result.report.adapters, expected.report.adapters, strict=True):
        assert (mine.module, mine.angles) == (theirs.module, pytest.approx(theirs.angles, abs=1e-3))
        assert (mine.error, mine.update_norm) == pytest.approx((theirs.error, theirs.update_norm), rel=1e-5)


def test_dropped_clients_of_every_server_are_reported():
    reference, clients = inputs("fedrot")
    broken = clients[0] | {A: clients[0][A] * math.nan}
    root = started(reference, on_invalid="drop")
    for name in ("north", "south"):
        edge = started(reference, on_invalid="drop")
        edge.add(broken)
        if name == "south":
            edge.add(clients[1], 2)
        root.merge(edge.partial(name))
    root.add(broken, name="mine")
    result = root.finish()
    assert result.report.clients == ("south/client 1",)
    assert list(result.report.dropped) == ["north/client 0", "south/client 0", "mine"]
    assert all(A in why for why in result.report.dropped.values())


def test_servers_of_clients_of_unequal_ranks_merge(tmp_path):
    """Each pads its clients to the reference's ranks and scaling; what they add up to does not tell which were padded."""
    wide = replace(UNEQUAL[0], config=UNEQUAL[0].config | {"r": 8, "lora_alpha": 4})
    reference = client_updates(wide, 1)[0], lora_config(wide)
    clients = [(client_updates(kind, 1, seed=i)[0], lora_config(kind)) for i, kind in enumerate((*UNEQUAL, wide))]
    at_once = fedrot.aggregate(clients, WEIGHTS[:4], reference, round=1)
    for tree in ([[0, 1], [2, 3]], [3, [0], [2, 1]]):
        root = started(reference)
        for i, node in enumerate(tree):
            if isinstance(node, int):
                added(root, clients, [node])
            else:
                added(started(reference), clients, node).partial().save(path := tmp_path / f"{len(tree)}.{i}")
                root.merge(path)
        result = root.finish()
        assert result.config == at_once.config
        torch.testing.assert_close(result.state_dict, at_once.state_dict, rtol=1e-9, atol=1e-9)
    other = reference[0], lora_config(replace(wide, config=wide.config | {"lora_alpha": 8}))
    with refused("the partial aggregate", "lora_alpha", 4, 8):
        started(other).merge(added(started(reference), clients, [0]).partial())


def tensor_bytes():
    gc.collect()
    # Not the fake tensors that a compiler may have left, which have no memory.
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def test_tensors_take_the_memory_of_one_update_however_many_there_are():
    reference, clients = inputs("fedrot")
    added(started(reference), clients, range(1))  # draws the projections, which are kept
    nothing = tensor_bytes()

    def sent(i):
        return {key: x.clone() for key, x in clients[i % 7].items()}

    stream = started(reference)
    for i in range(3):
        stream.add(sent(i))
    expected = tensor_bytes() - nothing
    sums = sum(x.nbytes for x in clients[0].values())
    # Of the error, and of that of the plain average.
    sketch = 2 * sum(8 * (SIZE * SIZE + 2 * SIZE * len(clients[0][a])) for a, _ in factor_keys(reference))
    # The library's: one client's sketches, rotations and their residuals.
    one = sum(4 * (2 * SIZE * r + r * r + 1) for r in (len(clients[0][a]) for a, _ in factor_keys(reference)))
    assert expected == sums + sketch + (one if stream._streamed.compiled else 0)
    for i in range(50):
        stream.add(sent(i), 1.0, f"another {i}")
    edges = [added(started(reference), clients, range(3)).partial(f"edge {i}") for i in range(2)]
    for edge in edges:
        stream.merge(edge)
    del edges, edge
    assert tensor_bytes() - nothing == expected
    round = stream._streamed
    assert len(round.angles) * round.angles.itemsize == 8 * (53 + 6) * len(factor_keys(reference))
    stream.finish()


def test_an_empty_update_is_refused_whatever_began_the_round(tmp_path):
    reference, clients = inputs("fedrot", KINDS["linear"])
    fedrot.write_adapter(tmp_path / "client", clients[0], plain_config(lora_config(KINDS["linear"])))
    begun = [started(reference) for _ in range(3)]
    begun[0].add(clients[0], 1.0, "client 0")
    begun[1].add(tmp_path / "client")
    begun[2].merge(added(started(reference), clients, range(1)).partial())
    for stream in begun:
        with refused("another lacks", "lora_A"):
            stream.add({}, 1.0, "another")


@pytest.mark.skipif(instruction_set() is None, reason="the compiled library is not there")
@pytest.mark.parametrize("kind", [KINDS[name] for name in ("modules to save", "convolution", "bfloat16")] + [MIXED])
@pytest.mark.parametrize("method", ["fedrot", "fedit", "random-rotation", "scalar"])
def test_the_compiled_library_and_pytorch_stream_alike(method, kind, monkeypatch):
    """Clients that the library does not take, strided ones, are added to the same sums by PyTorch."""
    reference, clients = inputs(method, kind)

    def stream(strided):
        aggregator = started(reference, method=method)
        for i, client in enumerate(clients):
            odd = {key: x.t().contiguous().t() if x.dim() == 2 else x for key, x in client.items()}
            aggregator.add(odd if i in strided else client, WEIGHTS[i])
        return aggregator.finish()

    found, mixed = stream(()), stream((0, 3))
    monkeypatch.setattr(compiled, "open_stream", lambda *args: None)
    expected = stream(())
    for result in (found, mixed):
        for key, x in expected.state_dict.items():
            own = torch.finfo(x.dtype).eps
            torch.testing.assert_close(result.state_dict[key], x, rtol=own + 4e-6, atol=4e-6 * float(x.abs().max()))
        for a, b in zip(result.report.adapters, expected.report.adapters, strict=True):
            assert a.angles == pytest.approx(b.angles, abs=1e-3)
            assert (a.undetermined, a.directions) == (b.undetermined, b.directions)
            assert (a.error, a.update_norm) == pytest.approx((b.error, b.update_norm), rel=1e-4)
            assert a.plain_error == (None if b.plain_error is None else pytest.approx(b.plain_error, rel=1e-4))


@pytest.mark.parametrize("on_invalid", ["raise", "drop"])
def test_a_client_that_is_refused_leaves_the_round_as_it_was(on_invalid):
    reference, clients = inputs("fedrot")
    last = list(reference)[-1]
    stream, expected = (started(reference, on_invalid=on_invalid) for _ in range(2))
    for i in range(3):
        stream.add(clients[i], WEIGHTS[i])
        expected.add(clients[i], WEIGHTS[i])
        broken = clients[i] | {last: clients[i][last] / 0}
        if on_invalid == "drop":
            stream.add(broken, name=f"broken {i}")
        else:
            with refused("broken", last, "NaN or Inf"):
                stream.add(broken, name="broken")
        huge = {key: x * 1e30 for key, x in clients[i].items()}
        with refused("huge", "overflow"):
            FedRotAggregator({k: x * 1e30 for k, x in reference.items()}, round=1).add(huge, name="huge")
    assert_same_bits(stream.finish().state_dict, expected.finish().state_dict)


def test_a_refused_client_leaves_no_counter():
    """Its integers are carried when it is added, not before: products that overflow are found last."""

    def client(scale, steps):
        a, b = torch.ones(4, 16) * scale, torch.ones(8, 4) * scale
        factors = {"base_model.model.l.lora_A.weight": a, "base_model.model.l.lora_B.weight": b}
        return factors | {"base_model.model.norm.num_batches_tracked": torch.tensor(steps)}

    aggregator = FedRotAggregator(client(1e18, 1))
    aggregator.add(client(1.0, 1))
    with pytest.raises(fedrot.UpdateError, match="overflow"):
        aggregator.add(client(4e37, 999))
    assert aggregator.finish().state_dict["base_model.model.norm.num_batches_tracked"] == 1
