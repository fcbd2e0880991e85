"""Aligning and averaging the factors of LoRA adapters: tensors in, tensors out."""

from .dispatch import align_average, average, average_factors, backends
from .distances import squared_distances, squared_distances_plain
from .errors import measure_errors
from .groupwise.together import align_together
from .measures import aggregation_error, error_bound, product_norm, rotation_angle
from .native_backend.columns import TensorColumns
from .native_backend.stream import ClientTensors, Stream
from .ops import cross_covariance, polar, procrustes, rotate_average
from .precision import full_precision, widen, working_dtype
from .rotations import frame_rotations
from .sketch import estimate_errors
from .streams import add_client_, find_rotations, open_stream
from .tolerances import FACTOR_FLOOR, PRODUCT_FLOOR
from .torch_backend.procrustes import soften, special_orthogonal
from .torch_backend.products import rotate_add_
from .types import Aligned, Averaged, Backend, Clients, Estimates, Factors, Rotations, Target, Together

__all__ = [
    "FACTOR_FLOOR",
    "PRODUCT_FLOOR",
    "Aligned",
    "Averaged",
    "Backend",
    "ClientTensors",
    "Clients",
    "Estimates",
    "Factors",
    "Rotations",
    "Stream",
    "Target",
    "TensorColumns",
    "Together",
    "add_client_",
    "aggregation_error",
    "align_average",
    "align_together",
    "average",
    "average_factors",
    "backends",
    "cross_covariance",
    "error_bound",
    "estimate_errors",
    "find_rotations",
    "frame_rotations",
    "full_precision",
    "measure_errors",
    "open_stream",
    "polar",
    "procrustes",
    "product_norm",
    "rotate_add_",
    "rotate_average",
    "rotation_angle",
    "soften",
    "special_orthogonal",
    "squared_distances",
    "squared_distances_plain",
    "widen",
    "working_dtype",
]
