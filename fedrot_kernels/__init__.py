"""Aligning and averaging the factors of LoRA adapters: tensors in, tensors out."""

from .batched import cross_covariance, polar, rotate_add_, rotate_average, soften, special_orthogonal

__all__ = ["cross_covariance", "polar", "rotate_add_", "rotate_average", "soften", "special_orthogonal"]
