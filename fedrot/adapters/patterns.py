"""Rank and alpha patterns of an adapter_config.json: which one counts for a module."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

_PLAIN = re.compile(r"[\w.]{1,1000}")  # a name: the dot is its only operator
_WHOLE = re.compile(r"\^((?:[^\W_]|_|\\[^\w\s])*)\$?")  # a whole name, escaped: no operator at all
# A client may have written a pattern, which is a regular expression. Python's engine can take forever to match one, even
# (a|a)(a|a)…, so RE2 does, in linear time and within this memory for all patterns of a field.
_MEMORY, _MOST_PATTERNS, _LONGEST = 16 << 20, 1000, 1000
# The same text means something else to RE2: {,3}, {01} and [[:alpha:]].
_OTHER_MEANING = re.compile(r"\{(\d*,)?0\d|\{,|\[:")
# RE2 has no lookarounds and no backreferences. Python tries patterns with these on names of at most 128 characters, if there
# are few repetitions and choices: two beside PEFT's own make the time cubic (1 ms), and each choice can double it.
_REPEATED_GROUP, _REPETITION = re.compile(r"\)[*+?{]"), re.compile(r"[*+]|\{\d*,|(?<![(*+?}])\?")
_MOST_REPETITIONS, _MOST_CHOICES, _LONGEST_NAME = 2, 6, 128

_MOST_NAMES, _MOST_CONFIGURATIONS = 4096, 64  # that are remembered

_Fits = Callable[[str], bool]


class Patterns:
    """The patterns of one field, compiled once.

    In PEFT each is a regular expression for the end of a module's name, and the first one that fits counts. A configuration
    may have a pattern for every module, so names without operators are looked up, not tried: such a pattern fits where it
    begins a part of the name and all its characters but the dots, which fit any, are the name's last. A pattern that begins
    with ^ and escapes its dots is a whole name, and is looked up too.

    Args:
        patterns: the patterns, in the order of the configuration.

    Raises:
        re.error: a pattern that is no regular expression, or one that could take forever to match; or too many patterns.
    """

    def __init__(self, patterns: Sequence[str]):
        self._plain: dict[tuple[int, ...], dict[str, int]] = {}  # length and places of dots → pattern → index
        self._whole: dict[str, int] = {}
        self._found: dict[str, int | None] = {}
        others: list[tuple[int, str]] = []
        for i, pattern in enumerate(patterns):
            if _PLAIN.fullmatch(pattern):
                dots = (place - len(pattern) for place, character in enumerate(pattern) if character == ".")
                self._plain.setdefault((len(pattern), *dots), {}).setdefault(pattern, i)
            elif whole := _WHOLE.fullmatch(pattern):
                self._whole.setdefault(re.sub(r"\\(.)", r"\1", whole[1]), i)
            else:
                others.append((i, pattern))
        if len(others) > _MOST_PATTERNS:
            raise re.error(f"{len(others)} patterns with operators, of which {_MOST_PATTERNS} are tried", others[-1][1])
        memory = _MEMORY // max(len(others), 16)
        self._others = [(i, _compile(pattern, memory)) for i, pattern in others]

    def first(self, name: str) -> int | None:
        """The index of the first pattern that fits, or None.

        Raises:
            re.error: a pattern that is not tried on a name like this, because it could take forever.
        """
        if name not in self._found:
            if len(self._found) >= _MOST_NAMES:
                self._found.clear()
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> int | None:
        found = [next((i for i, fits in self._others if fits(name)), None), self._whole.get(name)]
        for (length, *dots), indices in self._plain.items():
            if len(name) == length or name[:-length].endswith("."):
                end = [*name[-length:]]
                for place in dots:
                    end[place] = "."
                found.append(indices.get("".join(end)))
        return min((i for i in found if i is not None), default=None)


compiled = lru_cache(maxsize=64)(Patterns)
_recent: dict[int, tuple[Mapping[str, Any], Patterns, tuple[Any, ...]]] = {}


def look_up(patterns: Mapping[str, Any], name: str) -> tuple[int, Any] | None:
    """The index and the value of the first pattern that fits, or None; see ``Patterns.first``.

    Args:
        patterns: pattern → value, of a configuration that does not change. It is known again by its identity, because
            hashing all patterns for every module would take the square of their number.
        name: a module's name.
    """
    known = _recent.get(id(patterns))
    if known is None or known[0] is not patterns:
        if len(_recent) >= _MOST_CONFIGURATIONS:
            _recent.clear()
        known = _recent[id(patterns)] = patterns, compiled(tuple(patterns)), tuple(patterns.values())
    index = known[1].first(name)
    return None if index is None else (index, known[2][index])


def _compile(pattern: str, memory: int) -> _Fits:
    """The test of a name against a pattern, as PEFT's ``get_pattern_key`` does it."""
    if len(pattern) > _LONGEST:
        raise re.error(f"longer than {_LONGEST} characters", pattern)
    whole = rf"(.*\.)?({pattern})$"
    try:
        in_python = re.compile(whole)  # so that what PEFT could not compile is refused, whatever RE2 makes of it
    except (re.error, OverflowError, RecursionError) as error:
        raise re.error(str(getattr(error, "msg", error)), pattern) from error
    in_linear_time = _compile_linear(whole, memory)
    harmless = (
        not _REPEATED_GROUP.search(pattern)
        and len(_REPETITION.findall(pattern)) <= _MOST_REPETITIONS
        and pattern.count("|") <= _MOST_CHOICES
    )
    if in_linear_time is None and not harmless:
        raise re.error("could take forever to match", pattern)

    def fits(name: str) -> bool:
        if in_linear_time is not None and name.isascii():  # beyond ASCII, \w and others mean less in RE2
            return in_linear_time(name)
        if harmless and len(name) <= _LONGEST_NAME:
            return in_python.match(name) is not None
        raise re.error(f"could take forever to match a name of {len(name)} characters like {name[:40]}", pattern)

    return fits


def _compile_linear(pattern: str, memory: int) -> _Fits | None:
    """The test of an ASCII name against a pattern in linear time, or None where RE2 does not take the pattern."""
    if not pattern.isascii() or _OTHER_MEANING.search(pattern):
        return None
    import re2  # here, because most configurations have no patterns

    options = re2.Options()
    options.max_mem, options.never_capture, options.log_errors = memory, True, False
    options.encoding = re2.Options.Encoding.LATIN1  # one byte a character: a dot is one instruction
    try:
        expression = re2.compile(pattern.encode("ascii"), options)
    except re2.error:
        return None
    return lambda name: expression.match(name.encode("ascii")) is not None
