"""Settings for all tests, and the clients that several of them have."""

import pytest
import torch

from .peft_models import client_updates, save_clients
from .refusals import LINEAR

# The models here are tiny: a second thread gains nothing, and on a busy machine costs a multiple.
torch.set_num_threads(1)


@pytest.fixture
def clients():
    return client_updates(LINEAR, 3)


@pytest.fixture
def folders(tmp_path):
    return save_clients(LINEAR, tmp_path, 2)
