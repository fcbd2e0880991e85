"""How one round's clients become one adapter: a ``Round`` goes in, ``Averages`` come out, one file a paper."""

from .base import Method
from .registry import METHODS, make_method, methods_table

__all__ = ["METHODS", "Method", "make_method", "methods_table"]
