"""The version, in the code itself: a checkout that is not installed has no metadata to read it from."""

__version__ = "0.2.0.dev0"
"""The version of fedrot."""
