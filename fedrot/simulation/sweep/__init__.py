"""Comparisons: what varies, the runs that this makes, their tables and plots."""
