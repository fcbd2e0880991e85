"""Rank and alpha patterns mean what they mean in PEFT."""

import random
import re
import subprocess
import sys
import time

import pytest
from peft.utils.other import get_pattern_key

import fedrot
from fedrot.adapters.config import PREFIX, rank_of, whole_name

from ..refusals import refused


def some(generator, most):
    return "".join(generator.choice("ab.._") for _ in range(generator.randint(1, most)))


@pytest.mark.parametrize("seed", range(20))
def test_the_first_pattern_that_fits_is_pefts(seed):
    """Short names of few letters, so that many patterns fit, at a dot of the name or in the middle of a part."""
    generator, seen = random.Random(seed), set()
    for _ in range(100):
        patterns = {some(generator, 4) + generator.choice(["", "", "", "|a", "$", "[ab]"]): i for i in range(5, 0, -1)}
        name = some(generator, 8)
        r = rank_of({"r": 8, "rank_pattern": patterns}, PREFIX + name, "client 0")
        assert r == patterns.get(get_pattern_key(patterns, name), 8), (patterns, name)
        seen.add(r)
    assert len(seen) == 6


def some_expression(generator, depth=0):
    """A regular expression of a few parts, most of them repeated or chosen from."""
    kind = generator.random()
    if depth > 3 or kind < 0.35:
        return generator.choice(["a", "b", ".", "_", r"\.", "[ab]", "[^a]", r"\w", r"\d", "0", "1", r"\b", "^", "$", "A"])
    inner = some_expression(generator, depth + 1)
    if kind < 0.6:
        return inner + some_expression(generator, depth + 1)
    if kind < 0.75:
        return f"({inner}|{some_expression(generator, depth + 1)})"
    opening, closing = (
        generator.choice(["(", "(?:", "(?i:", "(?P<x>"]),
        generator.choice(["*", "+", "?", "{2}", "{,2}", "{01}", "*?"]),
    )
    return f"{opening}{inner}){closing}"


@pytest.mark.parametrize("seed", range(5))
def test_expressions_fit_as_in_peft(seed):
    generator, seen = random.Random(seed), set()
    for _ in range(400):
        pattern, name = some_expression(generator), "".join(generator.choice("aab..01_A") for _ in range(5))
        try:
            expected = get_pattern_key([pattern], name)
        except re.error:
            continue  # PEFT cannot load it either
        try:
            r = rank_of({"r": 8, "rank_pattern": {pattern: 1}}, PREFIX + name, "client 0")
        except fedrot.UpdateError:
            r = None  # RE2 reads {,2} and {01} otherwise, and Python would have to try too much
        if r is not None:
            assert r == (1 if expected == pattern else 8), (pattern, name)
        seen.add(r)
    assert seen == {1, 8, None}


# What people write, and names that it is about.
REAL = [
    r"^.*layers.*q_proj.*$",
    r"(0|1)+",
    r".*\.(0|[1-9]\d*)\..*(q|k|v)_proj",
    r"layers\.(1[0-9]|2[0-3])\.self_attn\.(q_proj|v_proj)",
    r"^(?!.*visual).*(q_proj|v_proj)$",
    r"(?:model\.)?layers\.\d+\.mlp\.(gate|up|down)_proj",
    r"^model\.layers\.11\.self_attn\.q_proj",
]
NAMES = [
    "model.layers.11.self_attn.q_proj",
    "model.layers.2.mlp.gate_proj",
    "model.visual.blocks.0.q_proj",
    "classifier.01",
    "lm_head",
]


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_that_people_write(pattern):
    found = {name: rank_of({"r": 8, "rank_pattern": {pattern: 1}}, PREFIX + name, "client 0") for name in NAMES}
    assert found == {name: 1 if get_pattern_key([pattern], name) == pattern else 8 for name in NAMES}
    assert {*found.values()} == {1, 8}


# Python's engine would take from minutes to the age of the universe.
TAKES_FOREVER = {
    r"(a+)+b": "a" * 64,
    r"(a|a)" * 60 + "b": "a" * 64,
    "a?" * 60 + "a" * 60: "a" * 60 + "b",
    r".*a.*a.*a.*a.*b": "a" * 5000,
}


@pytest.mark.parametrize("pattern", TAKES_FOREVER, ids=lambda pattern: pattern[:12])
def test_what_takes_python_forever_is_tried_in_linear_time(pattern):
    start = time.perf_counter()
    assert rank_of({"r": 8, "rank_pattern": {pattern: 1}}, PREFIX + TAKES_FOREVER[pattern], "client 0") == 8
    assert time.perf_counter() - start < 1


NEITHER = {
    r"(?=a)(a+)+b": "could take forever",
    r"(a+)+\3b": "could take forever",
    r"(?!x)" + r"(a|a)" * 30: "could take forever",
    r"(?!x)" + "a?" * 30: "could take forever",
    "(a{1000}){1000}": "could take forever",
    "a" * 1001 + "|": "longer than 1000",
    "a{99999999999999999999}": "too large",
    "(a": "unterminated",
    r"(?i)a": "flags",  # RE2 takes it, and PEFT does not
    r"\pL": "bad escape",
}


@pytest.mark.parametrize("pattern", NEITHER, ids=lambda pattern: pattern[:12])
def test_what_neither_engine_takes_is_refused(pattern):
    with refused("client 0: rank_pattern", repr(pattern[:80]), NEITHER[pattern], "name modules plainly"):
        # Whether or not it is needed: the same configuration must not pass for one module and fail for another.
        rank_of({"r": 8, "rank_pattern": {"a|b": 2, pattern: 1}}, PREFIX + "a", "client 0")


def test_names_beyond_ascii():
    # \w means more letters in Python than in RE2.
    for pattern, fits in ((r"\w+", True), (r"größe.*", True), (r"\w+b.*", False)):
        assert rank_of({"r": 8, "rank_pattern": {pattern: 1}}, "größe", "client 0") == (1 if fits else 8)
    with refused("(a|ö)+", "could take forever", "name modules plainly"):
        rank_of({"r": 8, "rank_pattern": {"(a|ö)+": 1}}, "größe", "client 0")
    with refused("(?!x).*", "name of 200 characters"):
        rank_of({"r": 8, "rank_pattern": {"(?!x).*": 1}}, "a" * 200, "client 0")


def test_thousands_of_whole_names_and_no_more_than_a_thousand_expressions():
    names = [f"model.layers.{i}.block-{i % 7}.q_proj" for i in range(3000)]
    start = time.perf_counter()
    for make in (whole_name, lambda name: whole_name(name) + "$"):
        patterns = {make(PREFIX + name): i for i, name in enumerate(names, start=1)}
        assert [rank_of({"rank_pattern": patterns}, PREFIX + name, "client 0") for name in names] == [*patterns.values()]
        assert rank_of({"rank_pattern": patterns}, PREFIX + "x." + names[0], "client 0") == 8
    assert time.perf_counter() - start < 10
    with refused("client 0: rank_pattern", "1001 patterns with operators"):
        rank_of({"rank_pattern": {f"a{i}|b": 1 for i in range(1001)}}, "a", "client 0")


def test_most_adapters_need_no_engine():
    code = r"""
import sys
from fedrot.adapters.patterns import Patterns
Patterns(["q_proj", r"^a\.b"])
assert "re2" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
