"""The registry of aggregation methods: one name for the API, the command line and the simulator."""

from .base import Method
from .registry import METHODS, get_method, methods_table
from .round import Round

__all__ = ["METHODS", "Method", "Round", "get_method", "methods_table"]
