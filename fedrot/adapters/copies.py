"""Tied weights, whose adapter PEFT saves twice: on an embedding, and transposed on a head (``ensure_weight_tying``)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .keys import TensorSpec, parse_factor


def find_copies(specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]) -> dict[str, str]:
    """The factors of embeddings that repeat a head's, transposed: key of the copy → key of the head's factor."""
    factors = {key: p for key in specs if (p := parse_factor(key)) and p.factor == "A" and p.partner in specs}
    embeddings = [key for key in factors if key.endswith(".lora_embedding_A")]
    heads = [key for key in factors if not key.endswith(".lora_embedding_A")]
    copies: dict[str, str] = {}
    for key_A in embeddings:
        key_B = factors[key_A].partner
        for head_A in heads:
            pair = {key_A: factors[head_A].partner, key_B: head_A}
            if all(is_copy(key, x, specs, read) for key, x in pair.items()):
                copies |= pair
                break
    return copies


def is_copy(key: str, original: str, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]) -> bool:
    """Whether one factor is the transpose of another, to the bit."""
    if key not in specs or original not in specs or specs[key].dtype != specs[original].dtype:
        return False
    return specs[key].shape == specs[original].shape[::-1] and torch.equal(read(key), read(original).mT)
