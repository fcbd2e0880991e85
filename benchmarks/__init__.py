"""Benchmarks of fedrot. Run them from a checkout: ``pytest benchmarks``, ``python -m benchmarks.aggregation``."""
