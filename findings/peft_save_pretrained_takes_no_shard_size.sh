#!/usr/bin/env bash
# PEFT 0.21.2: save_pretrained(max_shard_size=…) is accepted and changes nothing; adapters in shards come from Transformers.
#
# A good engineer's guess: an option that save_pretrained takes has an effect, or is an error, as in Transformers. Seen: the
# whole adapter is in one adapter_model.safetensors, however small the shards were to be. No index is written either.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6
cat > shards.py <<'PY'
from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), LoraConfig(r=8, target_modules=["0", "1"]))
model.save_pretrained("adapter", max_shard_size="1KB")
names = sorted(file.name for file in Path("adapter").iterdir())
size = Path("adapter/adapter_model.safetensors").stat().st_size
print(names, size, "bytes")
assert [name for name in names if "safetensors" in name] == ["adapter_model.safetensors"] and size > 8000
PY
venv/bin/python -W ignore shards.py
echo "as described: one file of more than eight times the largest shard"
