#!/usr/bin/env bash
# PEFT 0.21.2 with Transformers 5.24: ensure_weight_tying=True on a T5 gives one weight three adapters, of which two are tied.
#
# T5's shared, encoder, decoder and output embeddings are one tensor. A good engineer's guess: ensure_weight_tying gives all of
# them one adapter. Seen: the head gets the transposed factors of "shared", which no forward pass reads, while the encoder's
# and the decoder's embeddings, which are read, get factors of their own, drawn apart. Only linear layers are tied; embeddings
# that share the weight are not. The saved file holds all four, and nothing in it tells the tied pair from the others but its
# values.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6
cat > t5.py <<'PY'
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import T5Config, T5ForConditionalGeneration

torch.manual_seed(0)
base = T5ForConditionalGeneration(T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
ends = [base.shared, base.encoder.embed_tokens, base.decoder.embed_tokens, base.lm_head]
assert all(end.weight is base.shared.weight for end in ends)
model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=True))
state = get_peft_model_state_dict(model, save_embedding_layers=False)
found = {key.removeprefix("base_model.model."): x for key, x in state.items()}
head, shared = found["lm_head.lora_A.weight"], found["shared.lora_embedding_B"]
assert torch.equal(head, shared.T), "the head and shared are tied"
for name in ("encoder", "decoder"):
    own = found[f"{name}.embed_tokens.lora_embedding_B"]
    print(f"{name}: differs from shared by {float((own - shared).norm() / shared.norm()):.1f} of its norm")
    assert not torch.allclose(own, shared), name
PY
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error venv/bin/python -W ignore t5.py
echo "as described: the encoder's and the decoder's embeddings have adapters of their own"
