"""Adapters of every kind that PEFT makes and fedrot takes, on models small enough to build in a test."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes))


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, bos_token_id=0, eos_token_id=0, **sizes))


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=16, **sizes))


class Layers(nn.Module):
    """Layers of the kinds that the transformers above lack."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.conv = nn.Conv2d(3, 8, 3)
        self.wide = nn.Conv2d(8, 6, (3, 5), stride=2)
        self.pointwise = nn.Conv2d(6, 10, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.sequence = nn.Conv1d(10, 7, 3)
        self.attention = nn.MultiheadAttention(16, 2)
        self.linear = nn.Linear(16, 5)


class Mixture(nn.Module):
    """Four experts whose weights are one parameter each, under the name that mixtures use or another."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.input_linear = Experts(), Experts()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 24))
        self.down = nn.Parameter(torch.randn(4, 24, 16))


@dataclass(frozen=True)
class Kind:
    """A base model and what its LoraConfig sets."""

    base: Callable[[], nn.Module]
    config: dict = field(hash=False)
    dtype: torch.dtype = torch.float32


_ATTENTION = ["query", "value", "q_proj", "v_proj"]
_CONVOLUTIONS = ["conv", "wide", "pointwise", "sequence"]
KINDS = {
    "linear": Kind(vit, {"target_modules": _ATTENTION}),
    "GPT-2 Conv1D": Kind(gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": Kind(bert, {"target_modules": ["word_embeddings", "query"]}),
    "embedding, saved with its base": Kind(llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "convolution": Kind(Layers, {"target_modules": _CONVOLUTIONS}),
    "rank and alpha pattern": Kind(
        bert, {"target_modules": _ATTENTION, "rank_pattern": {"query": 1, "value": 8}, "alpha_pattern": {"query": 16}}
    ),
    "rsLoRA": Kind(bert, {"target_modules": _ATTENTION, "use_rslora": True}),
    "DoRA": Kind(bert, {"target_modules": _ATTENTION, "use_dora": True}),
    "DoRA on convolution and embedding": Kind(
        Layers, {"target_modules": [*_CONVOLUTIONS, "embedding", "linear"], "use_dora": True}
    ),
    "modules to save": Kind(bert, {"target_modules": _ATTENTION, "modules_to_save": ["classifier"]}),
    "LoRA bias": Kind(bert, {"target_modules": _ATTENTION, "lora_bias": True}),
    "bias of adapted layers": Kind(bert, {"target_modules": _ATTENTION, "bias": "lora_only"}),
    "trainable tokens": Kind(bert, {"target_modules": _ATTENTION, "trainable_token_indices": [1, 5]}),
    "multihead attention": Kind(Layers, {"target_modules": ["attention"]}),
    "float16": Kind(bert, {"target_modules": _ATTENTION, "modules_to_save": ["classifier"]}, torch.float16),
    "bfloat16": Kind(bert, {"target_modules": _ATTENTION, "modules_to_save": ["classifier"]}, torch.bfloat16),
    "float64": Kind(bert, {"target_modules": _ATTENTION, "modules_to_save": ["classifier"]}, torch.float64),
}


def base_model(kind: Kind) -> nn.Module:
    """The model before it is adapted, the same at every call."""
    torch.manual_seed(0)
    return kind.base().to(kind.dtype)


@cache
def peft_model(kind: Kind) -> PeftModel:
    """The adapted model. It is shared: set its adapter before reading it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8} | kind.config)
    return get_peft_model(base_model(kind), config, autocast_adapter_dtype=False)


def client_updates(kind: Kind, n: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """n updates as clients send them, every trained tensor random (a fresh lora_B would be zero)."""
    model, generator, updates = peft_model(kind), torch.Generator().manual_seed(seed), []
    for _ in range(n):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        updates.append({key: x.clone() for key, x in get_peft_model_state_dict(model).items()})
    return updates


def in_model(kind: Kind, update: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """The update under the names that its tensors have in the model, as parameters that want gradients."""
    model = peft_model(kind)
    set_peft_model_state_dict(model, update)
    sent = {name: p for name, p in model.named_parameters() if p.requires_grad or name in update}
    return {name: nn.Parameter(p.detach().clone()) for name, p in sent.items()}


def as_saved(kind: Kind, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT saves of a model whose parameters are these."""
    model = peft_model(kind)
    # Not strict: the frozen base is missing from an adapter's parameters. What is there must all belong to the model.
    assert not model.load_state_dict(parameters, strict=False).unexpected_keys
    return {key: x.clone() for key, x in get_peft_model_state_dict(model).items()}


def factor_keys(update: dict[str, Tensor]) -> list[tuple[str, str]]:
    """The keys of A and B of every adapter, of which there is one at least."""
    keys_A = [key for key in update if re.search(r"lora_(embedding_)?A", key)]
    assert keys_A
    return [(key, re.sub(r"(lora_(?:embedding_)?)A", r"\1B", key)) for key in keys_A]


@cache
def turned_clients(
    kind: Kind, n: int, *, noise: float = 0.1, reflect: bool = False, seed: int = 0
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A common adapter and n clients near it, each in a basis of its own; plain tensors are independent.

    Rotations by up to 2 radians from a basis in which the directions have distinct sizes, so that every rotation that a
    test asks for is determined, and softening it well conditioned. Reflections mirror the weakest direction.
    """
    generator = torch.Generator().manual_seed(seed)
    common, *clients = client_updates(kind, n + 1, seed)
    for key_A, key_B in factor_keys(common):
        A, B = common[key_A].double().flatten(1), common[key_B].double().flatten(1)
        (U, S, V_A), (_, _, V_B) = (torch.linalg.svd(F, full_matrices=False) for F in (A, B.T))
        sizes = torch.linspace(2, 1, len(S), dtype=torch.float64)[:, None]
        A, B = U @ (sizes * V_A), (U @ (sizes * V_B)).T / 4  # B is the smaller one, as in training
        common[key_A], common[key_B] = (F.reshape(common[k].shape).to(kind.dtype) for F, k in ((A, key_A), (B, key_B)))
        for client in clients:
            Q = _turn(U[:, -1:], reflect, generator)
            A_near, B_near = (F + noise * F.std() * torch.randn(F.shape, generator=generator).double() for F in (A, B))
            client[key_A] = (Q.T @ A_near).reshape(client[key_A].shape).to(kind.dtype)
            client[key_B] = (B_near @ Q).reshape(client[key_B].shape).to(kind.dtype)
    return common, clients


def _turn(weakest: Tensor, reflect: bool, generator: torch.Generator) -> Tensor:
    r = len(weakest)
    mirror = torch.eye(r, dtype=torch.float64) - weakest @ weakest.T * (2 if reflect else 0)
    plane = torch.eye(r, dtype=torch.float64) - (weakest @ weakest.T if reflect else 0)
    X = plane @ torch.randn(r, r, generator=generator, dtype=torch.float64) @ plane
    skew = X - X.T
    return torch.matrix_exp(2 * skew / torch.linalg.matrix_norm(skew, 2).clamp_min(1e-12)) @ mirror


def save_folder(kind: Kind, update: dict[str, Tensor], path: Path) -> Path:
    """The update as save_pretrained writes it."""
    model = peft_model(kind)
    set_peft_model_state_dict(model, update)
    model.save_pretrained(path)
    return path


def save_clients(kind: Kind, folder: Path, n: int, seed: int = 0) -> list[Path]:
    """n updates as folders."""
    return [save_folder(kind, u, folder / f"client{i}") for i, u in enumerate(client_updates(kind, n, seed))]
