"""FedRot-LoRA on Flower: a strategy, a client mod, and what clients and server send each other."""

try:
    import flwr  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("fedrot.flower needs Flower: pip install 'fedrot[flower]'") from error

from .arrays import from_arrays, to_arrays
from .client import receive, reply
from .mod import AlignMod, align_mod
from .strategy import FedRot

__all__ = ["AlignMod", "FedRot", "align_mod", "from_arrays", "receive", "reply", "to_arrays"]
