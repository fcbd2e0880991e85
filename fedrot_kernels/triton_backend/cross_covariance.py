"""Cross-covariance M = F F_refᵀ of every adapter and client in one launch, as partial sums over slices of d."""

import torch
import triton
import triton.language as tl

from .device import (
    accurate_dot,
    address,
    client_rows,
    frame_offset,
    on_rank_axis,
    on_width_axis,
    one_address,
    work_item,
)
from .launch import LaunchOptions, precision, rank_multiple, triton_dtype


@triton.jit
def _partial_product(
    p_F,
    p_ref,
    b_k,
    b_inside,
    rank,
    d,
    start,
    end,
    IS_A: tl.constexpr,
    ROWS: tl.constexpr,
    REF_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """F F_refᵀ over columns start … end of the frames, for rows k of the clients' frames."""
    j = tl.arange(0, REF_ROWS)
    b_M = tl.zeros((ROWS, REF_ROWS), tl.float32)
    for first in range(start, end, BLOCK_D):
        c = tl.multiple_of(first, BLOCK_D) + tl.arange(0, BLOCK_D)
        b_j, b_c = on_rank_axis(j, IS_A), on_width_axis(c, IS_A)
        at_F = p_F[:, None] + frame_offset(b_k[:, None], c[None, :], rank, d, IS_A)
        at_ref = p_ref + frame_offset(b_j, b_c, rank, d, IS_A)
        b_F = tl.load(at_F, mask=b_inside[:, None] & (c[None, :] < d), other=0.0)
        b_ref = tl.load(at_ref, mask=(b_j < rank) & (b_c < d), other=0.0)
        if IS_A:
            b_ref = tl.trans(b_ref)
        b_M = accurate_dot(b_F, b_ref, b_M, PRECISION)
    return b_M


@triton.jit(do_not_specialize=["first_client", "n_clients", "n_rows"])
def cross_covariance_kernel(
    p_table,
    p_items,
    p_M,
    first_client,
    n_clients,
    n_rows,
    DTYPE: tl.constexpr,
    REF_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M[item, client] (RP, RP) over one slice of d, for as many clients as fill ROWS rows: one product for all of them.

    The table has ``n_rows`` addresses per tensor, the reference's last. Even tensors are A (r, d), odd ones B (d, r). Rows
    and columns beyond a tensor's rank come out zero.
    """
    item = tl.program_id(0)
    tensor, rank, d, start = work_item(p_items + 4 * item, ALIGNED, RANK_MULTIPLE, SLICE)
    REF_ROWS: tl.constexpr = max(RP, 16)  # the least that tl.dot takes
    q = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    client, k = client_rows(q, RP, RP)
    client += first_client
    exists = client < n_clients
    p_tensor = p_table + tensor.to(tl.int64) * n_rows
    p_F = address(p_tensor + client, exists, DTYPE, ALIGNED, RP)
    p_ref = one_address(p_tensor + n_rows - 1, REF_DTYPE, ALIGNED)
    inside = exists & (k < rank)
    end = tl.minimum(start + SLICE, d)
    if tensor % 2 == 0:
        b_M = _partial_product(p_F, p_ref, k, inside, rank, d, start, end, True, ROWS, REF_ROWS, BLOCK_D, PRECISION)
    else:
        b_M = _partial_product(p_F, p_ref, k, inside, rank, d, start, end, False, ROWS, REF_ROWS, BLOCK_D, PRECISION)
    j = tl.arange(0, REF_ROWS)
    row = item.to(tl.int64) * n_rows * RP + first_client * RP + q
    tl.store(p_M + row[:, None] * RP + j[None, :], b_M, mask=exists[:, None] & (j[None, :] < RP))


def slice_length(RP: int) -> int:
    """How much of d one partial sum covers: its RP × RP result is then at most 1/64 of what it read (in numbers)."""
    return max(512, 64 * RP)


def options(RP: int, dtype: torch.dtype, ref_dtype: torch.dtype, aligned: bool, backend: str) -> LaunchOptions:
    """Choose how to launch.

    One stage, because the asynchronous copies of deeper pipelines are 4 bytes wide for float32 frames that must be
    transposed. 64 rows are the least that Hopper's matrix unit takes. BLOCK_D is as large as registers hold.
    """
    wide, mixed = RP == 128, dtype != ref_dtype
    constants = {
        "DTYPE": triton_dtype(dtype),
        "REF_DTYPE": triton_dtype(ref_dtype),
        "ALIGNED": aligned,
        "RANK_MULTIPLE": rank_multiple(RP, dtype),
        "RP": RP,
        "ROWS": 128 if wide else 64,
        "BLOCK_D": 64 if RP <= 32 else 16 if wide and mixed else 32,
        "SLICE": slice_length(RP),
        "PRECISION": precision(backend),
    }
    return LaunchOptions(constants, num_warps=8 if wide else 4, num_stages=1)
