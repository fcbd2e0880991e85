"""The embedded image task, which needs no network: a small ViT that knows upright digits learns turned ones."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from ..config import SimulationConfig
from .cache import cached_model, digest
from .classification import ClassificationTask
from .data import draw_subset
from .pretrained import keep_head_in_float32, prepare

PRETRAINING = 600
TEST = 400
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
_EPOCHS = 40
_SIZES: dict[str, Any] = {
    "num_labels": 10,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def load_digits_task(config: SimulationConfig, base_model: Path | None) -> ClassificationTask:
    """Load the turned digits, and the ViT: from ``base_model`` if given, from the cache, or pretrained here."""
    train, test = digits_data()
    train, test = draw_subset(train, config.max_train_examples), draw_subset(test, config.max_test_examples)
    model = prepare(ViTForImageClassification.from_pretrained(base_model) if base_model else digits_model(), config)
    keep_head_in_float32(model)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Tensor]:
        return {"pixel_values": torch.tensor(rows["pixel_values"], dtype=model.dtype)}

    classes = [str(digit) for digit in range(10)]
    defaults = {"target_modules": TARGETS}
    return ClassificationTask(train, test, np.array(train["label"]), classes, model, defaults, encode, "label")


def _images() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return (digits.images[order] / 8 - 1).astype(np.float32)[:, None], digits.target[order]


def digits_data() -> tuple[Dataset, Dataset]:
    """Make training and test examples of the digits that pretraining does not use, turned by 90°."""
    images, labels = _images()
    turned = np.rot90(images, axes=(2, 3))
    parts = slice(PRETRAINING + TEST, None), slice(PRETRAINING, PRETRAINING + TEST)
    train, test = (Dataset.from_dict({"pixel_values": turned[p].tolist(), "label": labels[p]}) for p in parts)
    return train, test


def digits_model() -> PreTrainedModel:
    """Load or pretrain a ViT of 69,000 parameters that knows upright digits. Deterministic."""
    images, labels = _images()
    x, y = images[:PRETRAINING], labels[:PRETRAINING]
    key = {"sizes": _SIZES, "epochs": _EPOCHS, "data": digest(x.tobytes() + y.tobytes())}
    return cached_model(
        "digits", ViTForImageClassification, key, lambda: _pretrain(torch.from_numpy(x), torch.from_numpy(y))
    )


def _pretrain(x: Tensor, y: Tensor) -> PreTrainedModel:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**_SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    rng = np.random.default_rng(0)
    for _ in tqdm(range(_EPOCHS), desc="pretraining the ViT on upright digits", unit="epoch", leave=False):
        for batch in np.array_split(rng.permutation(PRETRAINING), 10):
            loss = torch.nn.functional.cross_entropy(model(pixel_values=x[batch]).logits, y[batch])
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return model
