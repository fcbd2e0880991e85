"""Aligning and averaging the factors of LoRA adapters: tensors in, tensors out."""

from .dispatch import Aligned, Backend, align_average, average
from .groupwise.together import Target, Together, align_together
from .ops import cross_covariance, polar, procrustes, rotate_average
from .precision import full_precision
from .torch_backend.procrustes import NOISE, rotate_add_, soften, special_orthogonal

__all__ = [
    "NOISE",
    "Aligned",
    "Backend",
    "Target",
    "Together",
    "align_average",
    "align_together",
    "average",
    "cross_covariance",
    "full_precision",
    "polar",
    "procrustes",
    "rotate_add_",
    "rotate_average",
    "soften",
    "special_orthogonal",
]
