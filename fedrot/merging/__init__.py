"""Merging adapters that were trained independently: of unequal ranks, scalings, modules and names, into one."""
