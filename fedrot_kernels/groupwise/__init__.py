"""Alignment of clients to each other, in Gram space."""
