"""Federated averaging of LoRA adapters in a common basis (FedRot-LoRA, arXiv 2602.23638)."""

from .adapters.folder import read_adapter, write_adapter
from .errors import UpdateError
from .merging.merge import merge
from .methods.align import align
from .methods.registry import METHODS
from .options import AggregationOptions
from .ranks.truncation import truncate
from .report.fold import fold
from .report.report import AdapterReport, Report
from .report.result import AggregationResult
from .server.aggregate import aggregate
from .server.aggregator import FedRotAggregator
from .server.optimizer import ServerOptimizer
from .server.partial import PartialAggregate
from .version import __version__

__all__ = [
    "METHODS",
    "AdapterReport",
    "AggregationOptions",
    "AggregationResult",
    "FedRotAggregator",
    "PartialAggregate",
    "Report",
    "ServerOptimizer",
    "UpdateError",
    "__version__",
    "aggregate",
    "align",
    "fold",
    "merge",
    "read_adapter",
    "truncate",
    "write_adapter",
]
