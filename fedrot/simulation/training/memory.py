"""Measuring how many clients fit into one pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn

MARGIN = 0.6
"""The part of the free memory that is used. Other batches may be longer, and operations need memory of their own."""

_processes = 1


def share_memory(processes: int) -> None:
    """Leave the free memory in equal parts to as many processes, of which this is one."""
    global _processes
    _processes = processes


@contextmanager
def pass_memory(model: nn.Module, device: torch.device) -> Iterator[list[int]]:
    """Measure the memory that training within the context needs.

    On a GPU this is the peak. PyTorch does not count memory on a CPU; there it is the size of the storages that operations
    save for the backward pass, each counted once, without the model's own tensors and without what checkpoints keep.

    Yields:
        A list that holds the number of bytes when the context has ended.
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
    """Return the number of bytes that this process can still have."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def clients_that_fit(per_client: int, device: torch.device) -> int:
    """Count the clients that can train in one pass, at least one.

    Args:
        per_client: the number of bytes that one client needs.
        device: where they train.
    """
    return max(1, int(free_memory(device) / _processes * MARGIN / per_client))
