"""Partial aggregations that must not be merged, and files that must not be read."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedrot import FedRotAggregator, PartialAggregate

from ..peft_models import client_updates, save_folder
from ..refusals import HEAD, A, B, refused
from ..streams import KIND, NEEDS_ALL, added, assert_same, inputs, started

UNLIKE = {
    "round": ({"round": 3}, ["round", 3, 1]),
    "method": ({"method": "fedit"}, ["method", "fedit", "fedrot"]),
    "strength": ({"strength": 0.75}, ["strength", 0.75, 0.5]),
    "align_on": ({"align_on": "A"}, ["align_on", "alternate"]),
    "reflections": ({"reflections": True}, ["reflections", True, False]),
    "seed": ({"seed": 3}, ["seed", 3]),
}


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "from a file"])
@pytest.mark.parametrize(("options", "named"), UNLIKE.values(), ids=UNLIKE)
def test_servers_of_other_options_do_not_merge(tmp_path, options, named, saved):
    reference, clients = inputs("fedrot")
    partial = added(started(reference, **options), clients, [0]).partial("north")
    if saved:
        partial.save(tmp_path / "north")
        partial = PartialAggregate.load(tmp_path / "north")
    root = added(started(reference), clients, [1])
    with refused("north", *named):
        root.merge(partial)
    with refused("north", *named):
        started(reference).merge(partial)
    assert_same(root.finish(), added(started(reference), clients, [1]).finish())


def test_servers_that_aligned_to_another_reference_do_not_merge():
    reference, clients = inputs("fedrot")
    other = reference | {A: reference[A].nextafter(torch.tensor(math.inf))}
    with refused("north", "another reference"):
        started(other).merge(added(started(reference), clients, [0]).partial("north"))
    plain = started(other, method="fedit")  # where it plays no part
    plain.merge(added(started(reference, method="fedit"), clients, [0]).partial("north"))
    plain.finish()


def test_servers_of_other_adapters_do_not_merge(tmp_path):
    _, clients = inputs("fedit")
    spoils = {
        "keys": (lambda u: {k: x for k, x in u.items() if k != HEAD}, ["lacks", HEAD]),
        "shapes": (lambda u: u | {A: u[A][:, :8].contiguous()}, [A, "(4, 8)", "(4, 16)"]),
        "dtypes": (lambda u: {k: x.half() for k, x in u.items()}, ["float16", "float32"]),
    }
    for spoil, named in spoils.values():
        root = added(FedRotAggregator(method="fedit"), clients, [1])
        with refused("north", *named):
            root.merge(added(FedRotAggregator(method="fedit"), [spoil(clients[0])], [0]).partial("north"))
        assert root.finish().report.clients == ("client 1",)
    halved = replace(KIND, config=KIND.config | {"lora_alpha": 4})
    folders = [save_folder(kind, clients[0], tmp_path / str(i)) for i, kind in enumerate((KIND, halved))]
    root = added(FedRotAggregator(method="fedit"), folders, [0])
    with refused("north", "lora_alpha", 4, 8):
        root.merge(added(FedRotAggregator(method="fedit"), folders, [1]).partial("north"))
    root.merge(added(FedRotAggregator(method="fedit"), clients, [1]).partial())  # of which no scaling is known
    assert root.finish().config["lora_alpha"] == 8


def test_no_client_counts_twice():
    reference, clients = inputs("fedrot")
    partial = added(started(reference), clients, [0, 1]).partial()
    root = started(reference)
    root.merge(partial)
    for again in (partial, added(started(reference), clients, [1]).partial()):
        with refused("client", "already", "name"):
            root.merge(again)
    with refused("client 1", "name"):
        root.add(clients[1], name="client 1")
    for bad in ("", 3):
        with refused("name", error=ValueError):
            root.add(clients[1], name=bad)
        with refused("name", error=ValueError):
            root.partial(bad)
    assert root.finish().report.clients == ("client 0", "client 1")


@pytest.mark.parametrize(("method", "key"), [("ffa-lora", A), ("rolora", B)])
def test_what_no_client_trains_is_the_same_on_all_servers(method, key):
    reference, clients = inputs(method)
    moved = [client | {key: client[key] + 1} for client in clients]
    partial = added(FedRotAggregator(method=method, round=1), moved, [0]).partial("north")
    for root in (started(reference, method=method), added(FedRotAggregator(method=method, round=1), clients, [1])):
        with refused("north", key, method):
            root.merge(partial)
    root = FedRotAggregator(method=method, round=1)  # of which nothing but the partial aggregation tells
    root.merge(partial)
    with refused("client 1", key, method):
        added(root, clients, [1])
    assert torch.equal(added(root, moved, [2]).finish().state_dict[key], moved[0][key])


def test_what_cannot_be_streamed_or_merged_says_so():
    reference, clients = inputs("fedrot")
    partial = added(started(reference), clients, [0]).partial()
    assert NEEDS_ALL
    for method in NEEDS_ALL:
        aggregator = started(reference, method=method)
        for call in (lambda a=aggregator: a.add(clients[0]), lambda a=aggregator: a.merge(partial)):
            with refused("at once", "aggregate", error=ValueError):
                call()
    with refused("random-rotation", "one aggregator", error=ValueError):
        added(started(reference, method="random-rotation"), clients, [0]).partial()
    with refused("no updates", "partial()"):
        started(reference).partial()
    with refused("reference"):
        FedRotAggregator(round=1).merge(partial)


def damaged_header(change):
    def spoil(tensors, header):
        change(header)
        return tensors, header

    return spoil


def damaged_tensor(key, change):
    return lambda tensors, header: (tensors | {key: change(tensors[key])}, header)


SUM, LOST = f"sum/{A}", f"sketch/lost/{A}"
DAMAGED = {
    "another dtype": (damaged_tensor(SUM, torch.Tensor.half), [SUM, "F16", "F32", "(4, 16)"]),
    "another shape": (damaged_tensor(SUM, lambda x: x[:2].clone()), [SUM, "(2, 16)", "(4, 16)"]),
    "another shape of the sketch": (damaged_tensor(LOST, lambda x: x[:4].clone()), [LOST, "(4, 32)", "(32, 32)"]),
    "NaN in a sum": (damaged_tensor(SUM, lambda x: x * math.nan), [SUM, "(4, 16)", "NaN"]),
    "Inf in the sketch": (damaged_tensor(LOST, lambda x: x / 0), [LOST, "NaN or Inf"]),
    "NaN among weights": (damaged_tensor("weights", lambda x: x * math.nan), ["weights", "NaN"]),
    "a negative weight": (damaged_tensor("weights", lambda x: torch.tensor([-1.0, 4.0]).double()), ["weights"]),
    "other weights": (damaged_tensor("weights", lambda x: 3 * x), ["weights", "total"]),
    "a missing sum": (lambda t, h: ({k: x for k, x in t.items() if k != SUM}, h), [SUM, "missing"]),
    "something else": (lambda t, h: (t | {"code": torch.ones(3)}, h), ["code"]),
    "a huge shape": (damaged_header(lambda h: h["tensors"][0].__setitem__(2, [1 << 40, 1 << 20])), ["(", str(1 << 40)]),
    "no shape": (damaged_header(lambda h: h["tensors"][0].__setitem__(2, "16")), ["header"]),
    "a negative shape": (damaged_header(lambda h: h["tensors"][0].__setitem__(2, [-4, 16])), ["header", "-4"]),
    "a dtype of none": (damaged_header(lambda h: h["tensors"][0].__setitem__(3, "F4")), ["header", "F4"]),
    "a key twice": (damaged_header(lambda h: h["tensors"].append(h["tensors"][0])), ["header", A]),
    "a client twice": (damaged_header(lambda h: h.update(clients=["client 0"] * 2)), ["clients"]),
    "a client too many": (damaged_header(lambda h: h["clients"].append("me")), ["weights", "(2,)", "(3,)"]),
    "clients that are no names": (damaged_header(lambda h: h.update(clients=[0, 1])), ["clients"]),
    "frozen keys of others": (damaged_header(lambda h: h.update(frozen=["x"])), ["frozen", "x"]),
    "no number": (damaged_header(lambda h: h.update(unit=math.inf)), ["unit in its header"]),
    "a unit of nothing": (damaged_header(lambda h: h.update(unit=0.0, total_weight=3.0)), ["units of 0"]),
    "no field": (damaged_header(lambda h: h.pop("total_weight")), ["total_weight"]),
    "the last version": (damaged_header(lambda h: h.update(version=4)), ["not of version 5"]),
    "a later version": (damaged_header(lambda h: h.update(version=6)), ["not of version 5"]),
    "no adapters": (damaged_header(lambda h: h.update(tensors=h["tensors"][-2:])), ["lora_A/lora_B"]),
    "a name that cannot be written": (damaged_header(lambda h: h["clients"].__setitem__(0, "\ud800")), ["clients"]),
    "no name": (damaged_header(lambda h: h["clients"].__setitem__(0, "")), ["clients"]),
    "a rank that is none": (damaged_header(lambda h: h.update(config={"peft_type": "LORA", "r": "x"})), ["r is 'x'"]),
    "patterns that are none": (
        damaged_header(lambda h: h.update(config={"peft_type": "LORA", "rank_pattern": 3})),
        ["rank_pattern is 3"],
    ),
    "no LoRA": (damaged_header(lambda h: h.update(config={"peft_type": "IA3"})), ["IA3"]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    reference, clients = inputs("fedrot")
    path = tmp_path_factory.mktemp("saved") / "partial"
    added(started(reference), clients, [0, 1]).partial().save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return path, tensors, json.loads(file.metadata()["fedrot-partial"])


@pytest.mark.parametrize(("spoil", "named"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_and_refused(tmp_path, saved, spoil, named):
    _, tensors, header = saved
    tensors, header = spoil(tensors, json.loads(json.dumps(header)))
    save_file(tensors, path := tmp_path / "sent.safetensors", metadata={"fedrot-partial": json.dumps(header)})
    with refused(path, *named):
        PartialAggregate.load(path)


def test_what_is_no_such_file_is_refused(tmp_path, saved):
    whole = saved[0].read_bytes()
    broken = tmp_path / "broken"
    huge = json.dumps({"sum": {"dtype": "F32", "shape": [1 << 30, 1 << 20], "data_offsets": [0, 1 << 52]}}).encode()
    for content in (whole[:-1], whole[:100], b"", b"\x80\x04.", len(huge).to_bytes(8, "little") + huge):
        broken.write_bytes(content)
        with refused(broken, "safetensors"):
            PartialAggregate.load(broken)
    with refused("nowhere"):
        PartialAggregate.load(tmp_path / "nowhere")
    adapter = save_folder(KIND, client_updates(KIND, 1)[0], tmp_path / "adapter") / "adapter_model.safetensors"
    with refused(adapter, "no partial aggregate"):
        PartialAggregate.load(adapter)
    for text in ("[]", "{", "[" * 100000):
        save_file({"x": torch.ones(1)}, path := tmp_path / "other", metadata={"fedrot-partial": text})
        with refused(path):
            PartialAggregate.load(path)
