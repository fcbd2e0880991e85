"""Rotated averages Ā = Σ wᵢ RᵢᵀAᵢ and B̄ = Σ wᵢ BᵢRᵢ of every adapter in one launch."""

import torch
import triton
import triton.language as tl

from .device import (
    accurate_dot,
    address,
    all_finite,
    client_rows,
    frame_offset,
    on_rank_axis,
    on_width_axis,
    split_bfloat16,
    work_item,
)
from .launch import LaunchOptions, precision, rank_multiple, triton_dtype


@triton.jit
def _dot(b_R, b_F, b_total, IS_A: tl.constexpr, PRECISION: tl.constexpr):
    """Compute total + R F, or total + F R for B."""
    return accurate_dot(b_R, b_F, b_total, PRECISION) if IS_A else accurate_dot(b_F, b_R, b_total, PRECISION)


@triton.jit
def _dot_with_rotation(b_R, b_F, b_total, IS_A: tl.constexpr, PRECISION: tl.constexpr):
    """``_dot`` with R in float32 to the end: with bfloat16 F as three bfloat16 products, which are faster than tf32x3's."""
    if b_F.dtype == tl.bfloat16:
        b_high, b_middle, b_low = split_bfloat16(b_R)
        b_total = _dot(b_low, b_F, b_total, IS_A, PRECISION)
        b_total = _dot(b_middle, b_F, b_total, IS_A, PRECISION)
        b_total = _dot(b_high, b_F, b_total, IS_A, PRECISION)
    else:
        b_total = _dot(b_R, b_F, b_total, IS_A, PRECISION)
    return b_total


@triton.jit
def _mean_tile(
    p_clients,
    p_Rs,
    p_weights,
    p_mean,
    j,
    c,
    rank,
    d,
    n_clients,
    IS_A: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    RP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Average ranks j and columns c of one factor and store them. Returns whether they are finite."""
    OUT_ROWS: tl.constexpr = j.shape[0]
    RUN: tl.constexpr = min(RP, BLOCK_Q)
    b_mean = tl.zeros((OUT_ROWS, BLOCK_D) if IS_A else (BLOCK_D, OUT_ROWS), tl.float32)
    for first in range(0, n_clients * RP, BLOCK_Q):
        q = tl.multiple_of(first, BLOCK_Q) + tl.arange(0, BLOCK_Q)
        client, k = client_rows(q, RP, RUN)
        exists = client < n_clients
        inside = exists & (k < rank)
        weight = tl.load(p_weights + client, mask=exists, other=0.0)
        p_F = address(p_clients + client, exists, DTYPE, ALIGNED, RUN)
        # In the products, q takes the place of the width's axis in R, and of the rank's axis in F.
        b_j, b_c = on_rank_axis(j, IS_A), on_width_axis(c, IS_A)
        at_R = p_Rs + (on_width_axis(q, IS_A) * RP + b_j)
        at_F = on_rank_axis(p_F, IS_A) + frame_offset(on_rank_axis(k, IS_A), b_c, rank, d, IS_A)
        b_R = tl.load(at_R, mask=on_width_axis(inside, IS_A) & (b_j < rank), other=0.0) * on_width_axis(weight, IS_A)
        b_F = tl.load(at_F, mask=on_rank_axis(inside, IS_A) & (b_c < d), other=0.0)
        b_mean = _dot_with_rotation(b_R, b_F, b_mean, IS_A, PRECISION)
    finite = all_finite(b_mean.to(OUT_DTYPE))
    b_j, b_c = on_rank_axis(j, IS_A), on_width_axis(c, IS_A)
    tl.store(p_mean + frame_offset(b_j, b_c, rank, d, IS_A), b_mean, mask=(b_j < rank) & (b_c < d))
    return finite


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
    is finite is kept per item, so that the averages need not be read again to know.
    """
    item = tl.program_id(0)
    tensor, rank, d, start = work_item(p_items + 4 * item, ALIGNED, RANK_MULTIPLE, BLOCK_D)
    OUT_ROWS: tl.constexpr = max(RP, 16)  # the least that tl.dot takes
    j = tl.arange(0, OUT_ROWS)
    c = start + tl.arange(0, BLOCK_D)
    p_clients = p_table + tensor.to(tl.int64) * n_rows
    p_mean = p_out + tl.multiple_of(tl.load(p_offsets + tensor), 16)
    p_Rs = p_R + (tensor // 2).to(tl.int64) * n_clients * RP * RP
    if tensor % 2 == 0:
        finite = _mean_tile(
            p_clients, p_Rs, p_weights, p_mean, j, c, rank, d, n_clients,
            True, DTYPE, OUT_DTYPE, ALIGNED, RP, BLOCK_Q, BLOCK_D, PRECISION,
        )  # fmt: skip
    else:
        finite = _mean_tile(
            p_clients, p_Rs, p_weights, p_mean, j, c, rank, d, n_clients,
            False, DTYPE, OUT_DTYPE, ALIGNED, RP, BLOCK_Q, BLOCK_D, PRECISION,
        )  # fmt: skip
    tl.store(p_finite + item, finite)


def tile_length(RP: int) -> int:
    """How much of d one program averages."""
    return 128 if RP <= 32 else 64


def options(RP: int, dtype: torch.dtype, out_dtype: torch.dtype, aligned: bool, backend: str) -> LaunchOptions:
    """Choose how to launch: one stage, as in the cross-covariance, and blocks as large as registers hold without a stack."""
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
