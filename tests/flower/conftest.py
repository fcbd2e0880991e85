"""These tests need Flower, an optional extra. Nothing they start reports home."""

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("flwr") else ["test_*.py"]
# Read when Flower and Ray are imported.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module", autouse=True)
def collectable() -> Iterator[None]:
    """The app takes what there is out of garbage collection; other modules' tests get it back."""
    yield
    gc.unfreeze()
