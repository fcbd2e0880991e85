"""The CPU backends that a test runs on."""

import pytest

import fedrot_kernels as fk
from fedrot_kernels import dispatch


@pytest.fixture(params=["native", "torch"])
def cpu_backend(request, monkeypatch):
    """The backend that "auto" takes on a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "instruction_set", lambda: None)
    elif dispatch.instruction_set() is None:
        pytest.skip(f"the compiled library is {fk.backends()['native']}")
    return request.param
