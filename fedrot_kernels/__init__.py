"""Aligning and averaging the factors of LoRA adapters: tensors in, tensors out."""

from .batched import NOISE, cross_covariance, polar, rotate_add_, rotate_average, soften, special_orthogonal
from .precision import full_precision

__all__ = [
    "NOISE",
    "cross_covariance",
    "full_precision",
    "polar",
    "rotate_add_",
    "rotate_average",
    "soften",
    "special_orthogonal",
]
