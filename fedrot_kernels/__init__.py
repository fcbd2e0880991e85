"""Aligning and averaging the factors of LoRA adapters: tensors in, tensors out."""

from .dispatch import align_average, average, backends
from .groupwise.together import align_together
from .measures import aggregation_error, error_bound, product_norm, rotation_angle
from .ops import cross_covariance, polar, procrustes, rotate_average
from .precision import full_precision, widen, working_dtype
from .rotations import frame_rotations
from .tolerances import FACTOR_FLOOR, PRODUCT_FLOOR
from .torch_backend.procrustes import soften, special_orthogonal
from .torch_backend.products import rotate_add_
from .types import Aligned, Backend, Clients, Rotations, Target, Together

__all__ = [
    "FACTOR_FLOOR",
    "PRODUCT_FLOOR",
    "Aligned",
    "Backend",
    "Clients",
    "Rotations",
    "Target",
    "Together",
    "aggregation_error",
    "align_average",
    "align_together",
    "average",
    "backends",
    "cross_covariance",
    "error_bound",
    "frame_rotations",
    "full_precision",
    "polar",
    "procrustes",
    "product_norm",
    "rotate_add_",
    "rotate_average",
    "rotation_angle",
    "soften",
    "special_orthogonal",
    "widen",
    "working_dtype",
]
