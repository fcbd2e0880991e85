"""Clients that train in one pass end where ordinary PEFT training of each alone ends."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fedrot.simulation import SimulationConfig
from fedrot.simulation.training.local_training import clip_per_client, train_clients
from fedrot.simulation.training.stacked import StackedLinear, stacked_clients, trainable_parameters

CLIENTS, BATCH, STEPS, CLASSES = 3, 4, 3, 5
SMALL = {"num_labels": CLASSES, "initializer_range": 0.3}


def vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes, **SMALL))


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=12, **sizes, **dropout, **SMALL))


def gpt2():
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2ForSequenceClassification(
        GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, **dropout, **SMALL)
    )


CASES = {
    "vit": (vit, {"target_modules": ["q_proj", "v_proj"]}),
    "vit, all linear layers, rsLoRA": (vit, {"target_modules": "all-linear", "use_rslora": True}),
    "vit, rank and alpha patterns": (
        vit,
        {"target_modules": ["q_proj", "fc1"], "rank_pattern": {"fc1": 2}, "alpha_pattern": {"q_proj": 9}},
    ),
    "vit, DoRA": (vit, {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "vit, convolution": (vit, {"target_modules": ["projection", "q_proj"]}),
    "vit, bias of B": (vit, {"target_modules": ["q_proj"], "lora_bias": True}),
    "vit, every bias": (vit, {"target_modules": ["q_proj"], "bias": "all"}),
    "bert, trained head": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert, embedding": (bert, {"target_modules": ["word_embeddings", "query"]}),
    "gpt2, Conv1D": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "lr": 0.3, "momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.03, "weight_decay": 0.01},
    "sgd, clipped": {"optimizer": "sgd", "lr": 0.3, "max_grad_norm": 0.05},
}


def make_inputs(model, n):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64), "labels": labels}
    tokens = torch.randint(1, 40, (n, 10), generator=generator)
    mask = (torch.arange(10) < torch.randint(3, 11, (n, 1), generator=generator)).long()
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def mean_losses(logits, labels, clients):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none").view(clients, -1).mean(1)


def train_alone(model, start, batches, inputs, config, frozen=()):
    """What a client does without us: PEFT's model, torch's optimizer and clipping."""
    parameters = {name: p.requires_grad_(name not in frozen) for name, p in model.named_parameters() if name in start}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(start[name])
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters.values(), config.lr, config.momentum, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.AdamW(parameters.values(), config.lr, weight_decay=config.weight_decay)
    for indices in batches:
        batch = {name: x[indices] for name, x in inputs.items()}
        labels = batch.pop("labels")
        torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_each_client_trains_as_it_would_alone(case, optimizer):
    make, options = CASES[case]
    torch.manual_seed(0)
    model = get_peft_model(make(), LoraConfig(r=4, lora_alpha=8, **options)).double().train()
    config = SimulationConfig(local_steps=STEPS, batch_size=BATCH, **OPTIMIZERS[optimizer])
    inputs = make_inputs(model.get_base_model(), 30)
    start = {name: torch.randn(CLIENTS, *p.shape, dtype=p.dtype) * 0.2 for name, p in trainable_parameters(model).items()}
    indices = np.random.default_rng(0).integers(0, 30, (STEPS, CLIENTS, BATCH))

    alone = copy.deepcopy(model)
    trained, losses = train_clients(
        model, start, list(indices), lambda i: {name: x[i] for name, x in inputs.items()}, mean_losses, config
    )
    assert losses.shape == (CLIENTS,)
    for client in range(CLIENTS):
        expected = train_alone(alone, {k: v[client] for k, v in start.items()}, indices[:, client], inputs, config)
        for name, value in expected.items():
            if "lora" in name:
                assert (value - start[name][client]).abs().max() > 1e-4, f"{name} did not train: nothing was compared"
            torch.testing.assert_close(trained[name][client], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "lora_embedding_B"])
@pytest.mark.parametrize("case", ["vit", "vit, DoRA", "bert, trained head", "bert, embedding"])
def test_parameters_that_are_not_trained_stay(case, factor):
    make, options = CASES[case]
    torch.manual_seed(0)
    model = get_peft_model(make(), LoraConfig(r=4, lora_alpha=8, **options)).double().train()
    start = {name: torch.randn(CLIENTS, *p.shape, dtype=p.dtype) * 0.2 for name, p in trainable_parameters(model).items()}
    frozen = {name for name in start if factor in name}
    config = SimulationConfig(optimizer="adamw", lr=0.03, weight_decay=0.01, max_grad_norm=0.5)
    inputs = make_inputs(model.get_base_model(), 30)
    batches = list(np.random.default_rng(0).integers(0, 30, (STEPS, CLIENTS, BATCH)))
    alone = copy.deepcopy(model)
    trained, _ = train_clients(
        model,
        start,
        batches,
        lambda i: {k: x[i] for k, x in inputs.items()},
        mean_losses,
        config,
        trained=start.keys() - frozen,
    )
    assert not any(x.requires_grad for x in trained.values())
    for client in range(CLIENTS):
        mine = {k: v[client] for k, v in start.items()}
        expected = train_alone(alone, mine, [b[client] for b in batches], inputs, config, frozen)
        for name, value in trained.items():
            assert torch.equal(value[client], start[name][client]) == (name in frozen), name
            torch.testing.assert_close(value[client], expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_an_unknown_parameter_is_not_to_be_trained():
    model = get_peft_model(vit(), LoraConfig(r=2, target_modules=["q_proj"]))
    start = {name: torch.zeros(2, *p.shape) for name, p in trainable_parameters(model).items()}
    with pytest.raises(ValueError, match=r"^head is to be trained, but it is no trainable parameter of the model$"):
        train_clients(model, start, [np.zeros((2, 1), int)], None, None, SimulationConfig(), trained=["head"])


def test_the_model_is_as_before_and_the_start_unchanged():
    model = get_peft_model(vit(), LoraConfig(r=2, target_modules=["q_proj", "projection"]))
    modules = dict(model.named_modules())
    start = {name: torch.zeros(2, *p.shape) for name, p in trainable_parameters(model).items()}
    with contextlib.suppress(KeyboardInterrupt), stacked_clients(model, start, 3):
        assert any(isinstance(m, StackedLinear) for m in model.modules())
        raise KeyboardInterrupt
    assert dict(model.named_modules()) == modules


def test_dropout_differs_between_clients():
    torch.manual_seed(0)
    model = get_peft_model(vit(), LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "projection"])).train()
    same = {name: torch.randn(1, *p.shape).expand(2, *p.shape) for name, p in trainable_parameters(model).items()}
    x = torch.randn(1, 1, 8, 8).expand(2, 1, 8, 8)
    with stacked_clients(model, same, 1):
        first, second = model(pixel_values=x).logits
        assert not torch.equal(first, second)
        model.eval()
        first, second = model(pixel_values=x).logits
        torch.testing.assert_close(first, second)


def test_rows_that_do_not_belong_to_a_client_are_refused():
    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["position_embeddings"]))
    start = {name: torch.zeros(2, *p.shape) for name, p in trainable_parameters(model).items()}
    inputs = make_inputs(model.get_base_model(), 6)
    del inputs["labels"]
    message = r"position_embeddings: an input of shape .* is not 2 clients × 3 rows"
    with stacked_clients(model, start, 3), pytest.raises(ValueError, match=message):
        model(**inputs)


def test_a_tensor_that_two_modules_train_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"1.weight and 0.weight are one trainable tensor"):
        trainable_parameters(model)


def test_clipping_is_that_of_torch_for_every_client():
    torch.manual_seed(0)
    gradients = [torch.randn(4, 3, 2), torch.randn(4, 5)]
    expected = []
    for client in range(4):
        parameters = [torch.nn.Parameter(torch.zeros_like(g[client])) for g in gradients]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g[client].clone()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0)
        expected.append([p.grad for p in parameters])
    clip_per_client(gradients, 3.0)
    torch.testing.assert_close(gradients, [torch.stack(clients) for clients in zip(*expected, strict=True)])
