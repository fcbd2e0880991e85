"""Frozen linear layers skip padding, and nothing that counts is different."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from fedrot.simulation.training import local_training, packing
from fedrot.simulation.training.packing import packed_linears

from .test_dropout import CLIENTS, assert_same, bert, train

MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 1, 1]])


@pytest.mark.parametrize("bias", [True, False])
def test_real_tokens_are_as_before_and_the_others_zero(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=bias)).double().requires_grad_(False)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, 4, dtype=torch.float64) * MASK[..., None]
    expected = model(x)
    [gradient] = torch.autograd.grad((expected * weights).sum(), x)
    with packed_linears(model) as use_mask:
        use_mask(MASK)
        packed = model(x)
        torch.testing.assert_close(packed, expected * MASK[..., None], rtol=1e-12, atol=1e-12)
        [found] = torch.autograd.grad((packed * weights).sum(), x)
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)
        use_mask(None)
        assert torch.equal(model(x), expected)
        use_mask(torch.ones(3, 5))
        assert torch.equal(model(x), expected)


def test_other_shapes_and_trained_layers_are_left_and_the_model_is_as_before():
    model = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6))
    x, flat = torch.randn(3, 5, 6), torch.randn(7, 6)
    expected = model(flat)
    with contextlib.suppress(KeyboardInterrupt), packed_linears(model) as use_mask:
        use_mask(MASK)
        assert torch.equal(model(flat), expected)
        assert (model[1](x)[0, 4] != 0).all()
        assert (model[0](x)[0, 4] == 0).all()
        raise KeyboardInterrupt
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("lora", [{}, {"use_dora": True, "target_modules": ["query"]}], ids=["plain", "DoRA"])
def test_clients_train_the_same_with_and_without(monkeypatch, lora):
    packed = []
    forward = packing._Packing.forward

    def watched(self, linear, x):
        packed.append(self.real is not None and x.shape[:2] == self.shape)
        return forward(self, linear, x)

    monkeypatch.setattr(packing._Packing, "forward", watched)
    skipping = train(bert(**lora), CLIENTS)
    assert any(packed)
    monkeypatch.setattr(packing, "FULL", 0.0)
    assert_same(train(bert(**lora), CLIENTS), skipping)
    monkeypatch.undo()
    assert_same(train(bert(**lora), 1), skipping)  # one client's rows under vmap have the mask's shape


def test_checkpoints_compute_the_same_again():
    expected = train(bert(target_modules=["query"]), CLIENTS)
    model = bert(target_modules=["query"])
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert_same(expected, train(model, CLIENTS))


def test_a_causal_model_trains_the_same(monkeypatch):
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, initializer_range=0.3)
    torch.manual_seed(0)
    base = GPT2ForSequenceClassification(config)
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.2)
    model = get_peft_model(base, lora).double().train()
    together = train(model, CLIENTS)
    monkeypatch.setattr(local_training, "pass_overhead", lambda model, device: 0.0)
    assert_same(together, train(model, CLIENTS))
