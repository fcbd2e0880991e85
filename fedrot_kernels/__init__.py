"""Aligning and averaging the factors of LoRA adapters: tensors in, tensors out."""

from .checks import all_finite, find_zeros
from .dispatch import align_average, average, average_factors, backends
from .grouping import group_indices
from .groupwise.together import align_together
from .measures import aggregation_error, error_bound, product_norm, rotation_angle
from .native_backend.tensors import read_tensors
from .ops import cross_covariance, polar, procrustes, rotate_average
from .precision import full_precision, widen, working_dtype
from .rotations import frame_rotations
from .sketch import SKETCH_SIZE, estimate_errors, root, sketch, sum_and_deviation
from .streams import add_client_, find_rotations
from .tolerances import FACTOR_FLOOR, PRODUCT_FLOOR
from .torch_backend.procrustes import soften, special_orthogonal
from .torch_backend.products import rotate_add_
from .types import Aligned, Averaged, Backend, Clients, Estimates, Rotations, Target, Together

__all__ = [
    "FACTOR_FLOOR",
    "PRODUCT_FLOOR",
    "SKETCH_SIZE",
    "Aligned",
    "Averaged",
    "Backend",
    "Clients",
    "Estimates",
    "Rotations",
    "Target",
    "Together",
    "add_client_",
    "aggregation_error",
    "align_average",
    "align_together",
    "all_finite",
    "average",
    "average_factors",
    "backends",
    "cross_covariance",
    "error_bound",
    "estimate_errors",
    "find_rotations",
    "find_zeros",
    "frame_rotations",
    "full_precision",
    "group_indices",
    "polar",
    "procrustes",
    "product_norm",
    "read_tensors",
    "root",
    "rotate_add_",
    "rotate_average",
    "rotation_angle",
    "sketch",
    "soften",
    "special_orthogonal",
    "sum_and_deviation",
    "widen",
    "working_dtype",
]
