#!/usr/bin/env bash
# PEFT 0.21.2 with Transformers 5.24: merge_and_unload of an adapter of tied weights adds its update twice to the one weight.
#
# ensure_weight_tying=True on a Llama whose head and embedding are one tensor. A good engineer's guess: the option is there so that
# tied weights are adapted as one, and merging gives the model that was trained. Seen: with the adapter, both ends compute with
# W + s·B·A. merge_and_unload merges the head's copy and the embedding's into the tensor that they share, which ends as
# W + 2·s·B·A. Merging one of the two gives the trained model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6
cat > tied.py <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
before = base.lm_head.weight.detach().clone()
model = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"], ensure_weight_tying=True)).eval()
head = model.base_model.model.lm_head
with torch.no_grad():
    head.lora_B["default"].weight.normal_()
delta = head.get_delta_weight("default").detach()
x = torch.randn(3, 16)
with torch.no_grad():
    assert torch.allclose(head(x), x @ (before + delta).T, atol=1e-4), "with the adapter, the head computes with W + s·B·A"
merged = model.merge_and_unload()
assert merged.lm_head.weight is merged.model.embed_tokens.weight
change = merged.lm_head.weight.detach() - before
for times in (1, 2):
    far = float((change - times * delta).norm() / delta.norm())
    print(f"change − {times}·s·B·A: {far:.1e} of s·B·A")
    assert (far < 1e-5) == (times == 2)
PY
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error venv/bin/python -W ignore tied.py
echo "as described: the shared weight is changed twice"
