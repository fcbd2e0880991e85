"""Settings for all tests."""

import torch

# The models here are tiny: a second thread gains nothing, and on a busy machine costs a multiple.
torch.set_num_threads(1)
