#!/usr/bin/env bash
# PEFT 0.21.2 with Transformers 5.24.0: the usual LoRA recipe for ViT, target_modules ["query", "value", "classifier"], adapts
# the classifier alone, without a word.
#
# A good engineer's guess: names that fit BERT and fitted ViT for years still do, and a name that matches no module is an error,
# as it is where none matches. Seen: Transformers 5 calls ViT's projections q_proj and v_proj; BERT's are still query and
# value. PEFT drops names that match nothing as long as one name of the list matches, and raises only if none does. So all
# clients of a federation train a head on frozen features, and nothing looks wrong.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6
cat > targets.py <<'PY'
import warnings

from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}


def adapted(base, names):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(base, LoraConfig(target_modules=names))
    return sorted(model.targeted_module_names), [str(w.message) for w in said if "target" in str(w.message).lower()]


names = ["query", "value", "classifier"]
bert = adapted(BertForSequenceClassification(BertConfig(**sizes)), names)
vit = adapted(ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)), names)
print("BERT:", *bert)
print("ViT:", *vit)
assert len(bert[0]) == 3 and vit == (["classifier"], [])
try:
    adapted(ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)), names[:2])
except ValueError as error:
    print("ViT without the classifier:", error)
else:
    raise AssertionError("no error where no name matches")
PY
venv/bin/python -W ignore targets.py
echo "as described: the head alone is adapted, and nothing says so"
