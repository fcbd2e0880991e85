"""The kernels' tests: on a card where there is one, else executed on the CPU as compiled for two architectures."""

import pytest
import torch

if not torch.cuda.is_available():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def device(triton_device):
    """All tests here run kernels."""
    return triton_device
