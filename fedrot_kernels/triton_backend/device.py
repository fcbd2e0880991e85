"""Functions that the kernels share: addresses out of a table, frames in memory, and products accurate to float32.

Names in kernels: ``p_`` pointers, ``b_`` blocks in registers; q counts the rows of all clients' frames, k those of one
client's. A frame (r, d) is in memory as A (r, d) or as B (d, r). A block of it is loaded as it is in memory: its first axis
is the rank's for A and the width's for B.
"""

import triton
import triton.language as tl


@triton.jit
def client_rows(q, RP: tl.constexpr, RUN: tl.constexpr):
    """Row q of the stacked frames → client and rank index; each client has RP rows, RUN of which are consecutive in q."""
    return q // RP, tl.max_contiguous(q % RP, RUN)


@triton.jit
def address(entry, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, RUN: tl.constexpr):
    """Pointers out of the table, one per row q. Without the hints a 16-byte load is split into four or eight."""
    p = tl.max_constancy(tl.load(entry, mask=mask, other=0).to(tl.pointer_type(DTYPE)), RUN)
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def one_address(entry, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """One pointer out of the table."""
    p = tl.load(entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def work_item(p_item, ALIGNED: tl.constexpr, RANK_MULTIPLE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read a work item: (tensor, rank, d, start)."""
    tensor = tl.load(p_item)
    rank = tl.load(p_item + 1)
    d = tl.load(p_item + 2)
    start = tl.multiple_of(tl.load(p_item + 3), BLOCK_D)
    if ALIGNED:
        rank = tl.multiple_of(rank, RANK_MULTIPLE)
        d = tl.multiple_of(d, 8)
    return tensor, rank, d, start


@triton.jit
def on_rank_axis(b_x, IS_A: tl.constexpr):
    """A vector as a block that varies along the rank's axis of a frame in memory."""
    return tl.expand_dims(b_x, 1 if IS_A else 0)


@triton.jit
def on_width_axis(b_x, IS_A: tl.constexpr):
    """A vector as a block that varies along the width's axis of a frame in memory."""
    return tl.expand_dims(b_x, 0 if IS_A else 1)


@triton.jit
def frame_offset(b_k, b_c, rank, d, IS_A: tl.constexpr):
    """The offset of entry (k, c) of a frame from its first."""
    return b_k.to(tl.int64) * d + b_c if IS_A else b_c.to(tl.int64) * rank + b_k


@triton.jit
def accurate_dot(b_x, b_y, b_total, PRECISION: tl.constexpr):
    """Compute total + x y. Half precision is multiplied as it is, exactly in float32; anything else is in float32."""
    if (b_x.dtype == b_y.dtype) and (b_x.dtype != tl.float32):
        b_total = tl.dot(b_x, b_y, b_total)
    else:
        b_total = tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_total, input_precision=PRECISION)
    return b_total


@triton.jit
def all_finite(b_x):
    """1 if every entry is finite, else 0."""
    return tl.min((tl.abs(b_x.to(tl.float32)) < float("inf")).to(tl.int32))


@triton.jit
def split_bfloat16(b_x):
    """Three bfloat16 whose sum is a float32 exactly: its 24 bits in three times eight."""
    b_high = b_x.to(tl.bfloat16)
    b_rest = b_x - b_high.to(tl.float32)
    b_middle = b_rest.to(tl.bfloat16)
    b_low = (b_rest - b_middle.to(tl.float32)).to(tl.bfloat16)
    return b_high, b_middle, b_low
