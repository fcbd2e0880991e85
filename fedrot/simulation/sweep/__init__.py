"""Comparisons of many simulations: what varies, the runs, their tables and plots."""
