#!/usr/bin/env bash
# PEFT 0.21.2: a LoRA on nn.MultiheadAttention changes the output projection by 2·s·B·A, where get_delta_weight says s·B·A.
#
# A good engineer's guess: whoever averages, merges or converts an adapter may take ΔW = s·B·A from the file, for every module.
# Seen: PEFT wraps the attention and, inside it, its out_proj. Both merge the projection's update, so that the model computes with
# W + 2·s·B·A, and merge_and_unload writes that. The input projection is changed once. Averages are right, because the factor
# is the same for all; a converter that folds s·B·A by itself is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6
cat > attention.py <<'PY'
from copy import deepcopy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


torch.manual_seed(0)
base = Attention().eval()
model = get_peft_model(deepcopy(base), LoraConfig(r=2, lora_alpha=2, target_modules=["attention"])).eval()
projection = model.base_model.model.attention.base_layer.out_proj
with torch.no_grad():
    projection.lora_B["default"].weight.normal_()
    delta = projection.get_delta_weight("default")
    x = torch.randn(3, 5, 16)
    computed = model(x)
    for times in (1, 2):
        changed = deepcopy(base)
        changed.attention.out_proj.weight += times * delta
        far = float((changed(x) - computed).abs().max())
        print(f"W + {times}·s·B·A: outputs differ by {far:.1e}")
        assert (far < 1e-5) == (times == 2), far
    merged = model.merge_and_unload().attention.out_proj.weight - base.attention.out_proj.weight
    assert torch.allclose(merged, 2 * delta, atol=1e-5) and float(delta.abs().max()) > 0.1
PY
venv/bin/python -W ignore attention.py
echo "as described: the output projection is changed twice, in the model and in the merged weights"
