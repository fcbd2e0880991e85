"""Settings for all tests, and the clients that several of them have."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from .dense import KIND, UNEQUAL
from .peft_models import client_updates, save_clients
from .refusals import LINEAR

# The models here are tiny: a second thread gains nothing, and on a busy machine costs a multiple.
torch.set_num_threads(1)

# First, so that no worker is left alone with one of them in the end.
_LONGEST = [
    "test_deployment.py",
    "test_compile_matrix.py",
    "test_polar_kernels.py",
    "test_whole_model_kernels.py",
    "test_privacy.py",
    "test_example.py",
    "test_wheel.py",
    "test_editable.py",
    "test_workers.py",
    "test_methods.py",
    "test_run.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; within and after them the order stays."""
    items.sort(key=lambda item: [*_LONGEST, item.path.name].index(item.path.name))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory) -> Iterator[Path]:
    """Embedded models are pretrained once per session, whatever is in the user's cache, which stays as it is."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder := tmp_path_factory.mktemp("cache"))
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch) -> None:
    """Figures are made, but not drawn, which takes longer than a short simulation; tests marked ``drawn`` draw theirs."""
    if request.node.get_closest_marker("drawn") is None:
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(b"not drawn"))


@pytest.fixture
def clients():
    return client_updates(LINEAR, 3)


@pytest.fixture
def folders(tmp_path):
    return save_clients(LINEAR, tmp_path, 2)


@pytest.fixture
def updates():
    return client_updates(KIND, 3)


@pytest.fixture
def unequal():
    return [client_updates(kind, 1, seed)[0] for seed, kind in enumerate(UNEQUAL)]
