"""Rank and alpha patterns of an adapter_config.json: which one counts for a module."""

import re
from collections.abc import Sequence
from functools import lru_cache

# A client may have written a pattern, which is a regular expression: refuse those that could take forever to match.
_QUANTIFIED_GROUP, _UNBOUNDED, _MOST = re.compile(r"\)[*+?{]"), re.compile(r"[*+]|\{\d*,"), 2
_PLAIN = re.compile(r"[\w.]{1,1000}")  # a name: the dot is its only operator


class Patterns:
    """The patterns of one field, compiled once.

    In PEFT each is a regular expression for the end of a module's name, and the first one that fits counts. A configuration
    may have a pattern for every module, so names without operators are looked up, not tried: such a pattern fits where it
    begins a part of the name and all its characters but the dots, which fit any, are the name's last.
    """

    def __init__(self, patterns: Sequence[str]):
        self._plain: dict[tuple[int, ...], dict[str, int]] = {}  # length and places of dots → pattern → index
        self._others: list[tuple[int, re.Pattern[str]]] = []
        for i, pattern in enumerate(patterns):
            if _PLAIN.fullmatch(pattern):
                dots = (place - len(pattern) for place, character in enumerate(pattern) if character == ".")
                self._plain.setdefault((len(pattern), *dots), {}).setdefault(pattern, i)
            else:
                self._others.append((i, _compile(pattern)))

    def first(self, name: str) -> int | None:
        """The index of the first pattern that fits, or None."""
        found = [next((i for i, pattern in self._others if pattern.match(name)), None)]
        for (length, *dots), indices in self._plain.items():
            if len(name) == length or name[:-length].endswith("."):
                end = [*name[-length:]]
                for place in dots:
                    end[place] = "."
                found.append(indices.get("".join(end)))
        return min((i for i in found if i is not None), default=None)


compiled = lru_cache(maxsize=64)(Patterns)


def _compile(pattern: str) -> re.Pattern[str]:
    if _QUANTIFIED_GROUP.search(pattern) or len(_UNBOUNDED.findall(pattern)) > _MOST or len(pattern) > 1000:
        raise re.error("could take forever to match", pattern)
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise re.error(error.msg, pattern) from error
