"""Alignment of clients to each other, in Gram space: rotations that depend on all clients of a round."""
