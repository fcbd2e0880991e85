"""Streams of random numbers by seed and coordinates."""

import torch


def generator(seed: int, *stream: int) -> torch.Generator:
    """A stream of random numbers for these coordinates."""
    state = seed
    for number in stream:  # Fibonacci hashing spreads neighbours over the seeds
        state = (state * 0x9E3779B97F4A7C15 + number + 1) % (1 << 63)
    return torch.Generator().manual_seed(state)
