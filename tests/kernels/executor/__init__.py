"""Executes on a CPU the PTX that Triton compiles for a GPU; see the README beside this file."""

from .execution import Counts, Fault, Launch, Settings
from .launchers import executed
from .library import why_not
from .ptx import NotModelled

__all__ = ["Counts", "Fault", "Launch", "NotModelled", "Settings", "executed", "why_not"]
