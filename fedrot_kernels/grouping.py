"""Grouping tensors that are worked on together."""

from collections.abc import Hashable, Iterable


def group_indices(keys: Iterable[Hashable]) -> list[list[int]]:
    """The indices of equal keys, ascending; groups in the order in which their keys first appear."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())
