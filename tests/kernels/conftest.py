"""What a test's kernels run on."""

from importlib.util import find_spec

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels import dispatch

GPU = torch.cuda.is_available()
# Each architecture in one model of its tensor cores; the tests of products take both models of both.
EXECUTED = ("sm_80, truncating", "sm_90, rounding")

collect_ignore_glob = [] if find_spec("triton") else ["executor/*", "triton/*"]


@pytest.fixture(params=["native", "torch"])
def cpu_backend(request, monkeypatch):
    """The backend that "auto" takes on a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "instruction_set", lambda: None)
    elif dispatch.instruction_set() is None:
        pytest.skip(f"the compiled library is {fk.backends()['native']}")
    return request.param


@pytest.fixture(params=["card"] if GPU else EXECUTED)
def triton_device(request, monkeypatch):
    """Where Triton's kernels run: on a card, else they are executed as compiled for an architecture.

    What ``torch.empty`` gives holds NaN, and integers 0 (not finite), so that an element that no kernel writes shows.
    """
    if not GPU:
        from .executor import Settings, executed, why_not  # not at the top: it needs Triton

        if reason := why_not():
            pytest.skip(reason)
        architecture, tensor_cores = request.param.split(", ")
        with executed(int(architecture.removeprefix("sm_")), Settings(tensor_cores)) as device:
            yield device
        return
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x.zero_()

    monkeypatch.setattr(torch, "empty", poisoned)
    yield None
