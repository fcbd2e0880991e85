"""The executor's own tests need the compiler that builds its core."""

import pytest

from . import why_not


@pytest.fixture(autouse=True)
def buildable():
    if reason := why_not():
        pytest.skip(reason)
