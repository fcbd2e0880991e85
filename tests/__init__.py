import os

import torch

# Triton decides when it is imported whether kernels are interpreted, on CPU tensors; Transformers imports it, and the tests
# of the kernels run in the same process.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
