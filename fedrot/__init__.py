"""Federated averaging of LoRA adapters in a common basis (FedRot-LoRA, arXiv 2602.23638)."""

from .aggregation import aggregate
from .aggregator import FedRotAggregator
from .alignment import align
from .errors import UpdateError
from .folders import read_adapter, write_adapter
from .folding import fold
from .methods import METHODS
from .report import AdapterReport, Report
from .result import AggregationResult
from .server_optimizer import ServerOptimizer

__all__ = [
    "METHODS",
    "AdapterReport",
    "AggregationResult",
    "FedRotAggregator",
    "Report",
    "ServerOptimizer",
    "UpdateError",
    "aggregate",
    "align",
    "fold",
    "read_adapter",
    "write_adapter",
]
