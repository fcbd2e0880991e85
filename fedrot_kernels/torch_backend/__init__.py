"""The kernels in plain PyTorch: for the CPU, for float64, and for ranks that the Triton kernels do not take."""

from .whole_model import align_average, average

__all__ = ["align_average", "average"]
