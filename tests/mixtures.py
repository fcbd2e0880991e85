"""Small models of the kinds that transformers has with experts and tied weights, and adapters of them as PEFT makes them."""

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

SMALL = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1}


def qwen() -> nn.Module:
    sizes = {"intermediate_size": 24, "moe_intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **sizes, **experts))


def mixtral() -> nn.Module:
    sizes = {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, **sizes))


def jetmoe() -> nn.Module:
    sizes = {"intermediate_size": 12, "num_key_value_heads": 1, "kv_channels": 8, "num_local_experts": 4}
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**SMALL, **sizes, num_experts_per_tok=2))


def tied_llama() -> nn.Module:
    sizes = {"intermediate_size": 24, "num_attention_heads": 2, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **sizes))


def tied_gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=48, **sizes))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=48, **sizes))


# name → base model, what its LoraConfig sets, and how many adapters fedrot is to see.
EXPERTS = {
    "Qwen3-MoE, all linear": (qwen, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}, 3 * 2 + 1 + 4),
    "Qwen3-MoE, names of Transformers 4": (qwen, {"r": 2, "target_modules": ["gate_proj", "up_proj", "down_proj"]}, 6),
    "Mixtral, names of Transformers 4": (mixtral, {"r": 2, "target_modules": ["w1", "w2", "w3", "q_proj"]}, 9),
    "Mixtral, one parameter": (
        mixtral,
        {"r": 3, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        5,
    ),
    "JetMoE, no name of experts": (
        jetmoe,
        {"r": 3, "use_rslora": True, "target_modules": [], "target_parameters": ["mlp.input_linear.weight"]},
        4,
    ),
    "JetMoE, two modules": (
        jetmoe,
        {
            "r": 2,
            "target_modules": [],
            "target_parameters": ["mlp.input_linear.weight", "mlp.output_linear.weight"],
            "rank_pattern": {r".*input_linear\.weight": 5},
        },
        8,
    ),
}
TIED = {
    "Llama, head": (tied_llama, {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head"]}, 1),
    "Llama, embedding and head": (tied_llama, {"r": 4, "target_modules": ["lm_head", "embed_tokens", "q_proj"]}, 2),
    "GPT-2, head": (tied_gpt2, {"r": 3, "target_modules": ["lm_head", "c_attn"], "fan_in_fan_out": True}, 2),
}
TIED = {name: (base, {"ensure_weight_tying": True} | config, n) for name, (base, config, n) in TIED.items()}


def adapted(base, config, state: dict[str, Tensor] | None = None, dtype=torch.float64) -> PeftModel:
    """The adapted model, always of the same base, with an adapter's tensors if they are given."""
    torch.manual_seed(0)
    model = get_peft_model(base().to(dtype), LoraConfig(**config), autocast_adapter_dtype=False).eval()
    if state is not None:
        set_peft_model_state_dict(model, state)
    return model


def clients(base, config, n: int, seed: int = 0, dtype=torch.float64) -> tuple[LoraConfig, list[dict[str, Tensor]]]:
    """The LoRA configuration as PEFT completes it, and n updates, every trained tensor random."""
    model, generator, updates = adapted(base, config, dtype=dtype), torch.Generator().manual_seed(seed), []
    for _ in range(n):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=generator))
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        updates.append({key: x.clone() for key, x in state.items()})
    return model.peft_config["default"], updates


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """module → ΔW as PEFT computes it, of experts (E, …), in float64."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert layers
    return {name: m.get_delta_weight("default").detach().double() for name, m in layers.items()}


def base_weights(model: PeftModel) -> dict[str, Tensor]:
    """module → the weight or the parameter under its adapter."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {n: (m.get_param() if hasattr(m, "get_param") else m.get_base_layer().weight) for n, m in layers.items()}
