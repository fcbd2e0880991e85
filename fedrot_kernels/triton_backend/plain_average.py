"""Weighted means Σ wᵢxᵢ of any tensors in one launch: FedIT's factors, heads, biases."""

import torch
import triton
import triton.language as tl

from .device import address, all_finite
from .launch import LaunchOptions, triton_dtype


@triton.jit(do_not_specialize=["n_clients", "n_rows"])
def plain_average_kernel(
    p_table,
    p_items,
    p_weights,
    p_out,
    p_offsets,
    p_finite,
    n_clients,
    n_rows,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of one mean, CLIENTS clients at a time, accumulated in float32 and rounded once.

    Items are (tensor, elements, start), int64. The mean goes to ``p_out`` at the tensor's offset. Whether the block is
    finite is kept per item.
    """
    item = tl.program_id(0)
    tensor = tl.load(p_items + 3 * item)
    size = tl.load(p_items + 3 * item + 1)
    start = tl.multiple_of(tl.load(p_items + 3 * item + 2), BLOCK)
    x = start + tl.arange(0, BLOCK)
    if ALIGNED:
        size = tl.multiple_of(size, 8)
    p_clients = p_table + tensor * n_rows
    b_mean = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n_clients, CLIENTS):
        client = first + tl.arange(0, CLIENTS)
        exists = client < n_clients
        weight = tl.load(p_weights + client, mask=exists, other=0.0)
        p_x = address(p_clients + client, exists, DTYPE, ALIGNED, 1)
        b_x = tl.load(p_x[:, None] + x[None, :], mask=exists[:, None] & (x[None, :] < size), other=0.0)
        b_mean += tl.sum(b_x.to(tl.float32) * weight[:, None], 0)
    b_out = b_mean.to(DTYPE)
    tl.store(p_out + tl.multiple_of(tl.load(p_offsets + tensor), 16) + x, b_out, mask=x < size)
    tl.store(p_finite + item, all_finite(b_out))


BLOCK = 1024


def options(dtype: torch.dtype, aligned: bool) -> LaunchOptions:
    """Choose how to launch: four clients are in flight at once, which quarters the latency that is waited for."""
    constants = {"DTYPE": triton_dtype(dtype), "ALIGNED": aligned, "CLIENTS": 4, "BLOCK": BLOCK}
    return LaunchOptions(constants, num_warps=4, num_stages=1)
