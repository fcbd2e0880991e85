"""How many clients fit into one pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn

MARGIN = 0.6
"""The part of the free memory that is used: other batches are longer, and operations need room of their own."""


@contextmanager
def pass_memory(model: nn.Module, device: torch.device) -> Iterator[list[int]]:
    """Measures the memory that training within the context needs.

    On a GPU it is the peak. On a CPU, which has no such count, it is what operations save for the backward pass, a storage
    that several of them save once, without the model's own tensors; what checkpoints keep is not seen.

    Yields:
        A list, of the number of bytes when the context ends.
    """
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    known = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found
    found.append(sum(sizes.values()))


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still have."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def clients_that_fit(per_client: int, device: torch.device) -> int:
    """How many clients train in one pass, at least one.

    Args:
        per_client: bytes that one of them needs.
        device: where they train.
    """
    return max(1, int(free_memory(device) * MARGIN / per_client))
