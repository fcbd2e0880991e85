"""These tests need NVIDIA FLARE, an optional extra."""

from importlib.util import find_spec

import pytest

from ..peft_models import KINDS, turned_clients

collect_ignore_glob = [] if find_spec("nvflare") else ["test_*.py"]


@pytest.fixture
def start():
    from .rounds import contiguous

    return contiguous(turned_clients(KINDS["modules to save"], 3)[0])


@pytest.fixture
def updates():
    from .rounds import contiguous

    return [contiguous(update) for update in turned_clients(KINDS["modules to save"], 3)[1]]
