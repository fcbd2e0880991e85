"""The Triton kernels and their launchers. Imported when first used, because Triton is not there on every system."""

from .whole_model import align_average, average

__all__ = ["align_average", "average"]
