"""The embedded task, without a network: a small ViT that knows upright digits learns turned ones."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from tqdm import tqdm
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

PRETRAINING = 600
TEST = 400
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


def _images() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return (digits.images[order] / 8 - 1).astype(np.float32)[:, None], digits.target[order]


def digits_data() -> tuple[Dataset, Dataset]:
    """Training and test examples: those not used for pretraining, turned by 90°."""
    images, labels = _images()
    turned = np.rot90(images, axes=(2, 3))
    parts = slice(PRETRAINING + TEST, None), slice(PRETRAINING, PRETRAINING + TEST)
    train, test = (Dataset.from_dict({"pixel_values": turned[p].tolist(), "label": labels[p]}) for p in parts)
    return train, test


def digits_model() -> PreTrainedModel:
    """A ViT of 69,000 parameters, pretrained on upright digits. Deterministic."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**_SIZES))
    images, labels = _images()
    x, y = torch.from_numpy(images[:PRETRAINING]), torch.from_numpy(labels[:PRETRAINING])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    rng = np.random.default_rng(0)
    for _ in tqdm(range(40), desc="pretraining the ViT on upright digits", unit="epoch", leave=False):
        for batch in np.array_split(rng.permutation(PRETRAINING), 10):
            loss = torch.nn.functional.cross_entropy(model(pixel_values=x[batch]).logits, y[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()
