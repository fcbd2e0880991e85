"""The kernels' tests: compiled where there is a GPU, else in Triton's interpreter (see ``tests/__init__.py``)."""

from importlib.util import find_spec

import pytest
import torch

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]

if not torch.cuda.is_available():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def memory_holds_nan(monkeypatch):
    """What ``torch.empty`` returns holds NaN, and integers 0 (not finite): an element that no kernel writes shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x.zero_()

    monkeypatch.setattr(torch, "empty", poisoned)
