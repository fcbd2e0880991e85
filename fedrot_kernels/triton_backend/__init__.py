"""The Triton kernels and what launches them. Imported when a tensor is on a GPU: Triton is not there on every system."""

from .whole_model import align_average, average

__all__ = ["align_average", "average"]
