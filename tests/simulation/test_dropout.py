"""Every client's dropout is its own, whoever shares its pass."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from fedrot.simulation import SimulationConfig
from fedrot.simulation.training.dropout import ClientDropout
from fedrot.simulation.training.local_training import train_clients
from fedrot.simulation.training.stacked import trainable_parameters

CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CLIENTS, BATCH, STEPS = 4, 3, 3
LENGTHS = np.random.default_rng(0).integers(2, 13, 40)


def bert(attention="sdpa", **lora):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, max_position_embeddings=16, initializer_range=0.3, **SIZES)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.3
    config._attn_implementation = attention
    options = {"target_modules": ["query", "dense", "word_embeddings"], "lora_dropout": 0.3, "task_type": "SEQ_CLS", **lora}
    return get_peft_model(BertForSequenceClassification(config), LoraConfig(r=2, **options)).double().train()


def collate(indices):
    """Texts padded to the longest of the pass."""
    tokens = torch.randint(1, 40, (40, 12), generator=torch.Generator().manual_seed(0))[indices]
    lengths = torch.tensor(LENGTHS[indices])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": tokens[:, : mask.shape[1]] * mask, "attention_mask": mask, "labels": tokens[:, 0] % 2}


def losses(logits, labels, clients):
    return functional.cross_entropy(logits, labels, reduction="none").view(clients, -1).mean(1)


def train(model, per_pass, round=0):
    config = SimulationConfig(optimizer="sgd", lr=0.1)
    generator = torch.Generator().manual_seed(1)
    start = {
        name: torch.randn(CLIENTS, *p.shape, dtype=p.dtype, generator=generator) * 0.2
        for name, p in trainable_parameters(model).items()
    }
    indices = np.random.default_rng(1).integers(0, 40, (STEPS, CLIENTS, BATCH))
    parts = []
    for first in range(0, CLIENTS, per_pass):
        some = slice(first, first + per_pass)
        torch.manual_seed(round)
        seeds = [100 * round + client for client in range(CLIENTS)[some]]
        mine = {name: x[some] for name, x in start.items()}
        parts.append(train_clients(model, mine, list(indices[:, some]), collate, losses, config, seeds=seeds)[0])
    return {name: torch.cat([part[name] for part in parts]) for name in start}


def assert_same(first, second):
    assert first and first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True, "target_modules": ["query"]}], ids=["plain", "DoRA"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_clients_train_the_same_in_any_pass(attention, lora):
    model = bert(attention, **lora)
    together = train(model, CLIENTS)
    for per_pass in (1, 3):
        assert_same(together, train(model, per_pass))
    another = train(model, CLIENTS, round=1)
    assert all(
        not torch.allclose(another[name], x, rtol=1e-3, atol=1e-4) for name, x in together.items() if "lora_B" in name
    )


@pytest.mark.parametrize("per_pass", [2, CLIENTS])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_drops_the_same_again(reentrant, per_pass):
    expected = train(bert(target_modules=["query", "dense"]), CLIENTS)
    model = bert(target_modules=["query", "dense"])
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(expected, train(model, per_pass))


def masks(shape, p, seeds=range(4), batch_size=8):
    torch.manual_seed(0)
    with ClientDropout(seeds, batch_size, CPU).active():
        return [functional.dropout(torch.ones(shape), p) for _ in range(2)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_are_as_random_as_independent_ones(p):
    first, second = masks((32, 40, 50), p)
    n = first.numel()
    assert first.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    dropped, other = (first == 0).double() - p, (second == 0).double() - p
    bound = 5 * p * (1 - p)  # five standard deviations of a mean of products of independent ones, times √n
    assert abs(dropped.mean()) < 5 * (p * (1 - p) / n) ** 0.5
    pairs = {"two dropouts": (dropped, other)}
    for axis in range(3):
        for distance in (1, 2, 8, 16):
            pairs[f"axis {axis}, {distance} apart"] = dropped, dropped.roll(distance, axis)
    for name, (x, y) in pairs.items():
        assert abs((x * y).mean()) * n**0.5 < bound, name
    corners = dropped * dropped.roll(1, 1) * dropped.roll(1, 2) * dropped.roll((1, 1), (1, 2))  # of sums a_i + b_j
    assert abs(corners.mean()) * n**0.5 < 5 * (p * (1 - p)) ** 2


def test_masks_do_not_depend_on_padding_or_on_other_clients():
    long, short = (torch.stack(masks((32, size, size, 5), 0.5)) for size in (9, 7))
    assert torch.equal(long[:, :, :7, :7], short)
    all_four, two = torch.stack(masks((32, 50), 0.5)), torch.stack(masks((16, 50), 0.5, seeds=[1, 3]))
    assert torch.equal(all_four.view(2, 4, 8, 50)[:, [1, 3]].flatten(1, 2), two)


def test_a_tensor_of_no_client_is_dropped_alike_for_all():
    few, many = (masks((30, 5), 0.5, seeds=range(n))[0] for n in (2, 3))
    assert torch.equal(few, many)


def test_whole_channels_are_dropped():
    torch.manual_seed(0)
    with ClientDropout(range(2), 5, CPU).active():
        x = torch.nn.Dropout2d(0.5)(torch.ones(10, 20, 3, 4))
    assert (x == x[:, :, :1, :1]).all()
    assert 0.3 < (x == 0).double().mean() < 0.7


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}, {"mask": "bool"}, {"mask": "float"}]
)
def test_attention_with_dropout_is_attention(options):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2 if "enable_gqa" in options else 4, 6, 8, dtype=torch.float64)
    options = dict(options)
    if kind := options.pop("mask", None):
        mask = torch.rand(2, 1, 5, 6) < 0.7
        mask[..., 0] = True
        options["attn_mask"] = mask if kind == "bool" else torch.randn(2, 1, 5, 6, dtype=torch.float64)
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    with ClientDropout([0, 1], 1, CPU).active():
        assert torch.equal(functional.scaled_dot_product_attention(query, key, value, **options), expected)
        nearly = functional.scaled_dot_product_attention(query, key, value, dropout_p=1e-12, **options)
        many = [functional.scaled_dot_product_attention(query, key, value, dropout_p=0.3, **options) for _ in range(2000)]
    torch.testing.assert_close(nearly, expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(many[0], many[1])
    torch.testing.assert_close(torch.stack(many).mean(0), expected, rtol=0, atol=0.1)


def test_edges():
    x = torch.ones(4, 3, requires_grad=True)
    with ClientDropout([0, 1], 2, CPU).active():
        assert functional.dropout(x, 0.5, training=False) is x
        assert functional.dropout(x, 0.0) is x
        assert not functional.dropout(x, 1.0).any()
        with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
            functional.dropout(x, 1.5)
