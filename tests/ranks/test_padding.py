"""Clients of unequal ranks and scalings in one round: padded up to the server."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fedrot

from ..definitions import assert_same_bits
from ..dense import KIND, SHARES, UNEQUAL, WEIGHTS, WIDE, dense, lora_config, matrices, pairs, scaling_of
from ..peft_models import KINDS, client_updates, factor_keys, save_folder
from ..refusals import refused
from .isometries import expected

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
# What the clients of other kinds set: ranks up to the reference's 5.
OWN = [{"r": 2, "lora_alpha": 8}, {"r": 4, "lora_alpha": 3}, {"r": 5, "lora_alpha": 14}]
SHAPES = ["convolution", "embedding", "DoRA on convolution and embedding", "LoRA bias", "GPT-2 Conv1D", "bfloat16"]


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("on", ["A", "B", "joint"])
def test_a_client_of_smaller_rank_is_turned_by_a_partial_isometry(on, strength, reflections):
    reference, clients = pairs([WIDE], seed=9)[0], pairs([*UNEQUAL[:2], WIDE])
    result = fedrot.aggregate(clients, WEIGHTS.tolist(), reference, align_on=on, strength=strength, reflections=reflections)
    s = scaling_of([*UNEQUAL[:2], WIDE], WIDE)
    mean, rotations = expected(clients, reference[0], s, on, reflections, strength)
    for key, x in mean.items():
        torch.testing.assert_close(result.state_dict[key], x, rtol=0, atol=1e-9 * float(x.abs().max()))
    for (key, of_clients), report in zip(rotations.items(), result.report.adapters, strict=True):
        assert report.rank == len(reference[0][key])
        chords = [(R - torch.eye(*R.shape, dtype=R.dtype)).norm() / (2 * len(R) ** 0.5) for R in of_clients]
        assert report.angles == pytest.approx([float(2 * torch.rad2deg(torch.asin(c))) for c in chords], abs=1e-4)
    assert result.config["r"] == 7 and result.config["lora_alpha"] == 6


@pytest.mark.parametrize("name", SHAPES)
def test_every_kind_is_padded_and_its_update_stays(name):
    kind = KINDS[name]
    wide, *kinds = (replace(kind, config=kind.config | own) for own in ({"r": 5, "lora_alpha": 6}, *OWN))
    reference, clients = pairs([wide], seed=9)[0], pairs(kinds)
    result = fedrot.aggregate(clients, WEIGHTS.tolist(), reference, align_on="A", strength=0.7)
    mean, _ = expected(clients, reference[0], scaling_of(kinds, wide), "A", False, 0.7)
    s = scaling_of(kinds, wide)
    for key, x in client_updates(kind, 1)[0].items():
        got = result.state_dict[key]
        assert got.dtype == x.dtype and got.shape == reference[0][key].shape
        if key not in mean:
            ratios = s(key) if key.endswith("lora_B.bias") else [1] * 3
            of_clients = zip(SHARES, ratios, clients, strict=True)
            mean[key] = sum(share * ratio * client[key].double() for share, ratio, (client, _) in of_clients)
        # One rounding of the mean, and rotations that are those of float32.
        bound = torch.finfo(x.dtype).eps / 2 + 3e-6
        assert (got.double() - mean[key]).abs().max() <= bound * mean[key].abs().max(), key
    for client in clients[:2]:  # alone, it comes back in another basis
        alone = fedrot.aggregate([client], None, reference, align_on="A", strength=0.7).state_dict
        for keys in factor_keys(alone):
            (A, B), (A_padded, B_padded) = matrices(client[0], keys), matrices(alone, keys)
            ratio = s(keys[0])[0 if client is clients[0] else 1]
            eps = 2 * torch.finfo(kind.dtype).eps + 8 * torch.finfo(torch.float32).eps
            assert (B_padded @ A_padded - ratio * B @ A).norm() <= eps * ratio * A.norm() * B.norm()
            assert torch.linalg.matrix_rank(A_padded, rtol=1e-1) <= len(A) or name == "bfloat16"


@pytest.mark.parametrize(
    "options", [{"strength": 0.5}, {"strength": 0}, {"align_on": "joint", "reflections": True, "strength": 1}]
)
def test_padded_clients_one_by_one_in_any_order(options):
    reference, clients = pairs([WIDE], seed=9)[0], pairs([*UNEQUAL[:2], WIDE])
    whole = fedrot.aggregate(clients, WEIGHTS.tolist(), reference, **options)
    for order in ([0, 1, 2], [2, 0, 1]):
        stream = fedrot.FedRotAggregator(reference, **options)
        for i in order:
            stream.add(clients[i], WEIGHTS.tolist()[i])
        streamed = stream.finish()
        assert streamed.config == whole.config
        for key, x in whole.state_dict.items():
            torch.testing.assert_close(streamed.state_dict[key], x, rtol=1e-12, atol=1e-12)
        for a, b in zip(streamed.report.adapters, whole.report.adapters, strict=True):
            assert a.angles == pytest.approx([b.angles[i] for i in order], abs=1e-6)
    if options["strength"] == 0:
        for key_A, _ in factor_keys(reference[0]):
            A = sum(
                p * nn.functional.pad(c[key_A], (0, 0, 0, 7 - len(c[key_A])))
                for p, (c, _) in zip(SHARES, clients, strict=True)
            )
            torch.testing.assert_close(whole.state_dict[key_A], A, rtol=1e-12, atol=1e-12)


def test_without_a_reference_the_widest_client_is_one():
    clients = pairs([UNEQUAL[0], WIDE, UNEQUAL[1]])
    for method in ("fedrot-adaptive", "fedrot-consensus"):
        result = fedrot.aggregate(clients, [5, 1, 5], method=method)
        same = fedrot.aggregate(clients, [5, 1, 5], clients[1], method=method)
        assert_same_bits(result.state_dict, same.state_dict)
        assert result.config["r"] == 7 and "client 1" in result.report.target and "client" not in same.report.target[-15:]
    assert_same_bits(fedrot.aggregate(clients, [5, 1, 5]).state_dict, result.state_dict)
    # Of several, the one of the largest weight; none is widest everywhere, and the result spells its ranks out.
    kinds = [replace(KIND, config=KIND.config | {"rank_pattern": p}) for p in ({"query": 6}, {"value": 6})]
    result = fedrot.aggregate(pairs(kinds), [1, 2], strength=0)
    merged = replace(KIND, config=KIND.config | {k: result.config[k] for k in ("r", "rank_pattern", "alpha_pattern")})
    assert {len(x) for key, x in result.state_dict.items() if "lora_A" in key} == {6}
    assert dense(merged, result.state_dict)


def test_equal_ranks_of_unequal_scaling_are_scaled_and_rounded_once(tmp_path):
    kind = KINDS["bfloat16"]
    kinds = [replace(kind, config=kind.config | {"r": 4, "lora_alpha": alpha}) for alpha in (8, 20)]
    folders = [save_folder(k, client_updates(k, 1, i)[0], tmp_path / str(i)) for i, k in enumerate(kinds)]
    clients = [fedrot.read_adapter(folder) for folder in folders]
    result = fedrot.aggregate(folders, strength=0)
    for key, x in result.state_dict.items():
        first, second = (client[key].double() for client, _ in clients)
        mean = (first + second * (2.5 if "lora_B" in key else 1)) / 2
        assert (x.double() - mean).abs().max() <= torch.finfo(x.dtype).eps / 2 * mean.abs().max()
    assert result.config["lora_alpha"] == 8
    # The next round's reference has the scaling of the last round's result.
    aggregator = fedrot.FedRotAggregator(strength=0)
    aggregator.aggregate(folders[:1])
    second = aggregator.aggregate(folders[1:])
    key = factor_keys(clients[1][0])[0][1]
    assert torch.equal(second.state_dict[key], (clients[1][0][key] * 2.5).to(x.dtype)) and second.config["lora_alpha"] == 8


def test_what_cannot_be_padded_is_refused():
    reference, (small, middle, large) = pairs([UNEQUAL[1]], seed=9)[0], pairs([*UNEQUAL[:2], WIDE])
    key = factor_keys(small[0])[0][0]
    stream = fedrot.FedRotAggregator(reference)
    stream.add(small)
    for call in (
        lambda: fedrot.aggregate([small, large], None, reference),
        lambda: fedrot.FedRotAggregator(reference).add(large),
        lambda: stream.add(large),
    ):
        with refused("client", key, "(7, 16)", "(6, 16)", "the reference"):
            call()
    assert stream.finish().report.clients == ("client 0",)
    with refused("client 1", key, "(2, 16)", "(6, 16)", "configs="):
        fedrot.aggregate([middle[0], small[0]])
    with refused("client 0", key, "(2, 16)", "no LoRA configuration"):
        fedrot.FedRotAggregator(reference).add(small[0])
    with refused("the reference has no LoRA configuration", key, "rank 6"):
        fedrot.aggregate([small], None, reference[0])
    with refused("client 1", key, "(2, 16)", "says rank 6"):
        fedrot.aggregate([middle, (small[0], middle[1])])
    with refused("the reference", key, "(6, 16)", "the update has (2, 16)"):
        fedrot.align(small[0], reference[0])
    with refused("client 1", "use_dora"):
        fedrot.aggregate([middle, (small[0], {**small[1].to_dict(), "use_dora": True})])
    with refused("tuple"):
        fedrot.aggregate([(small[0], None)])


@pytest.mark.parametrize("one_by_one", [False, True])
def test_ranks_that_no_client_of_a_round_has_can_still_be_trained(one_by_one):
    reference = client_updates(WIDE, 1)[0]
    fresh = {key: torch.zeros_like(x) if "lora_B" in key else x for key, x in reference.items()}
    config = lora_config(WIDE)
    clients = pairs(UNEQUAL[:1] * 2)
    server = fedrot.FedRotAggregator((fresh, config))
    for client in clients if one_by_one else ():
        server.add(client)
    result = server.finish() if one_by_one else server.aggregate(clients)
    for key_A, key_B in factor_keys(fresh):
        A, B = result.state_dict[key_A], result.state_dict[key_B]
        k = clients[0][0][key_A].shape[0]
        assert torch.equal(A[k:], fresh[key_A][k:]) and not B[:, k:].any() and not torch.equal(A[:k], fresh[key_A][:k])


def test_the_widest_client_may_be_dropped():
    clients = pairs([*UNEQUAL[:2], WIDE])
    broken = ({key: x * torch.nan for key, x in clients[2][0].items()}, clients[2][1])
    options = {"strength": 0.5, "align_on": "A"}
    result = fedrot.aggregate([*clients[:2], broken], on_invalid="drop", **options)
    without = fedrot.aggregate(clients[:2], **options)
    assert list(result.report.dropped) == ["client 2"] and result.config == without.config
    assert_same_bits(result.state_dict, without.state_dict)
    with refused("client 2", "NaN"):
        fedrot.aggregate([*clients[:2], broken], **options)
