"""Small Triton kernels to execute: right ones, and ones with a fault each."""

import triton
import triton.language as tl


@triton.jit
def add(p_x, p_y, p_out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i, mask=i < n, other=0.0).to(tl.float32)
    b_y = tl.load(p_y + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(p_out + i, b_x + b_y, mask=i < n)


@triton.jit
def add_without_mask(p_x, p_y, p_out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + i, tl.load(p_x + i) + tl.load(p_y + i))


@triton.jit
def add_to_input(p_x, p_y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + i, tl.load(p_x + i) + tl.load(p_y + i))


@triton.jit
def add_all_to_one_place(p_x, p_out, BLOCK: tl.constexpr):
    tl.store(p_out, tl.sum(tl.load(p_x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))))


@triton.jit
def promise_too_much(p_x, p_out, start, BLOCK: tl.constexpr):
    """The pointer is said to be a multiple of 16 bytes, which it is not for every start."""
    i = tl.arange(0, BLOCK)
    tl.store(p_out + i, tl.load(tl.multiple_of(p_x + start, 16) + i))


@triton.jit
def statistics(p_x, p_out, N: tl.constexpr):
    """The sum, the largest and the smallest number of each row, as float32, and where the largest is."""
    row = tl.program_id(0)
    b_x = tl.load(p_x + row * N + tl.arange(0, N)).to(tl.float32)
    tl.store(p_out + row * 4, tl.sum(b_x))
    tl.store(p_out + row * 4 + 1, tl.max(b_x))
    tl.store(p_out + row * 4 + 2, tl.min(b_x))
    tl.store(p_out + row * 4 + 3, tl.argmax(b_x, 0).to(tl.float32))


@triton.jit
def product(
    p_x,
    p_y,
    p_out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_TRANSPOSED: tl.constexpr,
    Y_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = x y (M, N), x and y in either layout."""
    i, j = tl.arange(0, M), tl.arange(0, N)
    b_out = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if X_TRANSPOSED:
            b_x = tl.trans(tl.load(p_x + k[:, None] * M + i[None, :]))
        else:
            b_x = tl.load(p_x + i[:, None] * K + k[None, :])
        if Y_TRANSPOSED:
            b_y = tl.trans(tl.load(p_y + j[:, None] * K + k[None, :]))
        else:
            b_y = tl.load(p_y + k[:, None] * N + j[None, :])
        b_out = tl.dot(b_x, b_y, b_out, input_precision=PRECISION)
    tl.store(p_out + i[:, None] * N + j[None, :], b_out)


@triton.jit
def convert(p_x, p_out, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(p_out + i, tl.load(p_x + i).to(p_out.dtype.element_ty))


@triton.jit
def collatz(p_x, p_out, p_out_steps, N: tl.constexpr):
    """Steps of the Collatz iteration, which programs leave at different times; the largest number on the way."""
    x = tl.load(p_x + tl.program_id(0))
    largest, steps = x, 0
    while x > 1:
        if x % 2 == 0:  # noqa: SIM108 - a branch is wanted
            x = x // 2
        else:
            x = 3 * x + 1
        largest = tl.maximum(largest, x)
        steps += 1
    tl.store(p_out + tl.program_id(0), largest)
    tl.store(p_out_steps + tl.program_id(0), steps)


@triton.jit
def bits(p_x, p_y, p_out, N: tl.constexpr):
    """Shifts, logic, products and divisions of integers, each in a row of the result."""
    i = tl.arange(0, N)
    x, y = tl.load(p_x + i), tl.load(p_y + i)
    n = y & 15
    tl.store(p_out + i, x >> n)
    tl.store(p_out + N + i, x << n)
    tl.store(p_out + 2 * N + i, (x & y) ^ (x | ~y))
    tl.store(p_out + 3 * N + i, x * y)
    tl.store(p_out + 4 * N + i, x // (n + 1))
    tl.store(p_out + 5 * N + i, x % (n + 1))
    tl.store(p_out + 6 * N + i, tl.minimum(x, y) - tl.maximum(x, -y))
    tl.store(p_out + 7 * N + i, tl.abs(x))


@triton.jit
def through_scratch(p_x, p_out_scratch, p_out, N: tl.constexpr):
    """Reverse x through global memory, which needs the barrier between."""
    i = tl.arange(0, N)
    tl.store(p_out_scratch + i, tl.load(p_x + i))
    tl.debug_barrier()
    tl.store(p_out + i, tl.load(p_out_scratch + (N - 1) - i))
