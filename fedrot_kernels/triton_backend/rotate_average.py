"""Rotated averages Ā = Σ wᵢ RᵢᵀAᵢ and B̄ = Σ wᵢ BᵢRᵢ of every adapter in one launch."""

import torch
import triton
import triton.language as tl

from .device import accurate_dot, address, all_finite, client_rows, split_bfloat16, work_item
from .launch import LaunchOptions, precision, rank_multiple, triton_dtype


@triton.jit
def _dot_with_rotation(b_R, b_F, b_total, ROTATION_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """total + R F or F R with R in float32 to the end: in bfloat16, three products instead of tf32x3's three slower ones."""
    if b_F.dtype == tl.bfloat16:
        b_high, b_middle, b_low = split_bfloat16(b_R)
        if ROTATION_FIRST:
            b_total = tl.dot(b_low, b_F, b_total)
            b_total = tl.dot(b_middle, b_F, b_total)
            b_total = tl.dot(b_high, b_F, b_total)
        else:
            b_total = tl.dot(b_F, b_low, b_total)
            b_total = tl.dot(b_F, b_middle, b_total)
            b_total = tl.dot(b_F, b_high, b_total)
        return b_total
    elif ROTATION_FIRST:
        return accurate_dot(b_R, b_F, b_total, PRECISION)
    else:
        return accurate_dot(b_F, b_R, b_total, PRECISION)


@triton.jit(do_not_specialize=["n_clients", "n_rows"])
def rotate_average_kernel(
    p_table,
    p_items,
    p_R,
    p_weights,
    p_out,
    p_offsets,
    p_finite,
    n_clients,
    n_rows,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    RP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of d of one averaged factor: the sum over clients is the product [w₁R₁ᵀ … w_NR_Nᵀ] [F₁; …; F_N].

    Accumulates in float32 in the order of clients and rounds once, into ``p_out`` at the tensor's offset. Whether the tile
    is finite is kept per item, so that nobody has to read the averages again to know.
    """
    item = tl.program_id(0)
    tensor, rank, d, start = work_item(p_items + 4 * item, ALIGNED, RANK_MULTIPLE, BLOCK_D)
    OUT_ROWS: tl.constexpr = max(RP, 16)  # the least that tl.dot takes
    RUN: tl.constexpr = min(RP, BLOCK_Q)
    j = tl.arange(0, OUT_ROWS)
    c = start + tl.arange(0, BLOCK_D)
    p_clients = p_table + tensor.to(tl.int64) * n_rows
    p_mean = p_out + tl.multiple_of(tl.load(p_offsets + tensor), 16)
    p_Rs = p_R + (tensor // 2).to(tl.int64) * n_clients * RP * RP
    if tensor % 2 == 0:
        b_A = tl.zeros((OUT_ROWS, BLOCK_D), tl.float32)
        for first in range(0, n_clients * RP, BLOCK_Q):
            q = tl.multiple_of(first, BLOCK_Q) + tl.arange(0, BLOCK_Q)
            client, k = client_rows(q, RP, RUN)
            exists = client < n_clients
            inside = exists & (k < rank)
            weight = tl.load(p_weights + client, mask=exists, other=0.0)
            p_F = address(p_clients + client, exists, DTYPE, ALIGNED, RUN)
            at_R = p_Rs + (q[None, :] * RP + j[:, None])
            at_F = p_F[:, None] + (k[:, None].to(tl.int64) * d + c[None, :])
            b_R = tl.load(at_R, mask=inside[None, :] & (j[:, None] < rank), other=0.0) * weight[None, :]
            b_F = tl.load(at_F, mask=inside[:, None] & (c[None, :] < d), other=0.0)
            b_A = _dot_with_rotation(b_R, b_F, b_A, True, PRECISION)
        finite = all_finite(b_A.to(OUT_DTYPE))
        tl.store(p_mean + (j[:, None].to(tl.int64) * d + c[None, :]), b_A, mask=(j[:, None] < rank) & (c[None, :] < d))
    else:
        b_B = tl.zeros((BLOCK_D, OUT_ROWS), tl.float32)
        for first in range(0, n_clients * RP, BLOCK_Q):
            q = tl.multiple_of(first, BLOCK_Q) + tl.arange(0, BLOCK_Q)
            client, k = client_rows(q, RP, RUN)
            exists = client < n_clients
            inside = exists & (k < rank)
            weight = tl.load(p_weights + client, mask=exists, other=0.0)
            p_F = address(p_clients + client, exists, DTYPE, ALIGNED, RUN)
            at_R = p_Rs + (q[:, None] * RP + j[None, :])
            at_F = p_F[None, :] + (c[:, None].to(tl.int64) * rank + k[None, :])
            b_R = tl.load(at_R, mask=inside[:, None] & (j[None, :] < rank), other=0.0) * weight[:, None]
            b_F = tl.load(at_F, mask=inside[None, :] & (c[:, None] < d), other=0.0)
            b_B = _dot_with_rotation(b_R, b_F, b_B, False, PRECISION)
        finite = all_finite(b_B.to(OUT_DTYPE))
        tl.store(p_mean + (c[:, None].to(tl.int64) * rank + j[None, :]), b_B, mask=(j[None, :] < rank) & (c[:, None] < d))
    tl.store(p_finite + item, finite)


def tile_length(RP: int) -> int:
    """How much of d one program averages."""
    return 128 if RP <= 32 else 64


def options(RP: int, dtype: torch.dtype, out_dtype: torch.dtype, aligned: bool, backend: str) -> LaunchOptions:
    """How to launch. One stage, as in the cross-covariance; blocks as large as registers hold without a stack."""
    constants = {
        "DTYPE": triton_dtype(dtype),
        "OUT_DTYPE": triton_dtype(out_dtype),
        "ALIGNED": aligned,
        "RANK_MULTIPLE": rank_multiple(RP, dtype),
        "RP": RP,
        "BLOCK_Q": 32 if RP <= 64 else 16,
        "BLOCK_D": tile_length(RP),
        "PRECISION": precision(backend),
    }
    return LaunchOptions(constants, num_warps=8 if RP >= 64 else 4, num_stages=1)
