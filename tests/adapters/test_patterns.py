"""Rank and alpha patterns mean what they mean in PEFT."""

import random

import pytest
from peft.utils.other import get_pattern_key

from fedrot.adapters.config import PREFIX, rank_of


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
