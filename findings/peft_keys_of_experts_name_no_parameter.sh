#!/usr/bin/env bash
# PEFT 0.21.2 with Transformers 5.24: the keys of an experts adapter name no parameter, and the fused one has twice the rank.
#
# target_modules=["gate_proj", "up_proj", "down_proj"] on a Qwen3 mixture. A good engineer's guess: keys name what they adapt, r
# is r, and a warning that a pattern is ignored is true. Seen: Transformers 5 keeps experts in two parameters, gate_up_proj and
# down_proj, and PEFT adapts these instead. Their factors are "experts.base_layer.lora_A" (gate_up_proj) and "experts.lora_A"
# (down_proj): the module's order of parameters decides, and nothing in the file says it. The fused one has rank 2 r by a
# rank_pattern that PEFT adds, and of which PEFT warns that it "did not match any targeted module and were ignored" while
# applying it. Each factor stacks all experts, A with the expert slowest and B with it fastest, so that its first axis is no rank.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6
cat > experts.py <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

E, r = 3, 4
sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": E, "num_experts_per_tok": 2}
base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    config = LoraConfig(r=r, lora_alpha=r, target_modules=["gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(base, config)
said = [str(w.message) for w in warned if "rank_pattern" in str(w.message)]
assert said and "ignored" in said[0] and "gate_up_proj" in said[0], said
state = {key.split("mlp.")[1]: x for key, x in get_peft_model_state_dict(model).items()}
for key, x in state.items():
    print(key, tuple(x.shape))
assert state["experts.base_layer.lora_A.weight"].shape == (E * 2 * r, 16), "gate_up_proj reads the hidden size"
assert state["experts.lora_A.weight"].shape == (E * r, 12), "down_proj reads the experts' size"
assert not any("gate_up" in key or "down" in key for key in state)
outer = model.base_model.model.model.layers[0].mlp.experts
assert (outer.parameter_name, outer.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
with torch.no_grad():
    outer.lora_B["default"].weight.normal_()
    A, B = (state[f"experts.lora_{f}.weight"] for f in "AB")
    delta = outer.get_delta_weight("default")
    for e in range(E):
        assert torch.allclose(delta[e], outer.lora_B["default"].weight[:, e::E] @ A[e * r : (e + 1) * r], atol=1e-5)
print("warned:", said[0])
PY
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error venv/bin/python experts.py
echo "as described: keys without a parameter's name, twice the rank, and a warning that is not true"
