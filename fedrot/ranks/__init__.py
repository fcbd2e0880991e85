"""Adapters of unequal rank, scaling or modules in one layout: pad, truncate, union."""
