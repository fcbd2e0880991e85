"""Federated averaging of LoRA adapters in a common basis (FedRot-LoRA, arXiv 2602.23638)."""

from .aggregation import AggregationResult, FedRotAggregator, aggregate
from .alignment import align
from .errors import UpdateError
from .folders import read_adapter, write_adapter
from .methods import METHODS
from .report import AdapterReport, Report

__all__ = [
    "METHODS",
    "AdapterReport",
    "AggregationResult",
    "FedRotAggregator",
    "Report",
    "UpdateError",
    "aggregate",
    "align",
    "read_adapter",
    "write_adapter",
]
