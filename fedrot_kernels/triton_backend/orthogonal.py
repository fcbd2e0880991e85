"""Steps on small square matrices in registers, one or several per program, for both polar kernels.

A tile (SIZE, SIZE) holds SIZE / RP matrices on its diagonal, each RP × RP; ``b_same`` says which entries belong to one of
them. What is known per matrix is a vector over the tile's rows or columns, or of length one if there is one matrix.
"""

import triton
import triton.language as tl


@triton.jit
def sum_of_matrix(b_x, b_same, ONE: tl.constexpr):
    """(SIZE,) per row or column → the sum over each matrix."""
    if ONE:
        return tl.sum(b_x, 0, keep_dims=True)
    else:
        return tl.sum(tl.where(b_same, b_x[None, :], 0.0), 1)


@triton.jit
def max_of_matrix(b_x, b_same, ONE: tl.constexpr):
    """(SIZE,) of non-negative numbers → the largest of each matrix."""
    if ONE:
        return tl.max(b_x, 0, keep_dims=True)
    else:
        return tl.max(tl.where(b_same, b_x[None, :], 0.0), 1)


@triton.jit
def first_of_matrix(b_where, b_k, b_same, ONE: tl.constexpr, SIZE: tl.constexpr):
    """(SIZE,) conditions → the smallest index k within each matrix at which one holds."""
    b_index = tl.where(b_where, b_k, SIZE)
    if ONE:
        return tl.min(b_index, 0, keep_dims=True)
    else:
        return tl.min(tl.where(b_same, b_index[None, :], SIZE), 1)


@triton.jit
def determinant_sign(b_R, b_k, b_same, RP: tl.constexpr, SIZE: tl.constexpr):
    """The sign of each determinant, by elimination with row pivots: signs of the pivots times that of the row order."""
    ONE: tl.constexpr = SIZE == RP
    b_sign = tl.where(sum_of_matrix(tl.sum(b_R * b_R, 0), b_same, ONE) >= 0, 1.0, 1.0)  # of a loop's type
    b_left = b_k >= 0  # the rows without a pivot yet
    for column in range(RP):
        b_column = tl.sum(tl.where(b_same & (b_k == column)[None, :], b_R, 0.0), 1)
        b_size = tl.where(b_left, tl.abs(b_column), 0.0)
        b_pivot_row = first_of_matrix(b_left & (b_size == max_of_matrix(b_size, b_same, ONE)), b_k, b_same, ONE, SIZE)
        b_is_pivot = b_k == b_pivot_row
        b_pivot = sum_of_matrix(tl.where(b_is_pivot, b_column, 0.0), b_same, ONE)
        b_above = sum_of_matrix(tl.where(b_left & (b_k < b_pivot_row), 1.0, 0.0), b_same, ONE)
        b_sign *= tl.where(b_pivot < 0, -1.0, 1.0) * (1.0 - 2.0 * (b_above.to(tl.int32) % 2).to(tl.float32))
        b_left = b_left & (b_k != b_pivot_row)
        b_factor = b_column / tl.where(b_pivot == 0, 1.0, b_pivot)  # one in the pivot's row, which becomes zero
        b_row = tl.sum(tl.where(b_same & b_is_pivot[:, None], b_R, 0.0), 0)
        b_R = tl.where(b_same, b_R - b_factor[:, None] * b_row[None, :], 0.0)
    return b_sign


@triton.jit
def longest_column(b_P, b_k, b_same, RP: tl.constexpr, SIZE: tl.constexpr):
    """(SIZE,) the longest column of each matrix, scaled to length one."""
    ONE: tl.constexpr = SIZE == RP
    b_length = tl.sum(b_P * b_P, 0)
    b_column = first_of_matrix(b_length == max_of_matrix(b_length, b_same, ONE), b_k, b_same, ONE, SIZE)
    b_v = tl.sum(tl.where(b_same & (b_k == b_column)[None, :], b_P, 0.0), 1)
    b_largest = max_of_matrix(tl.abs(b_v), b_same, ONE)
    b_v = b_v / tl.where(b_largest == 0, 1.0, b_largest)
    b_norm = sum_of_matrix(b_v * b_v, b_same, ONE)
    return b_v / tl.sqrt(tl.where(b_norm == 0, 1.0, b_norm))


@triton.jit
def slice_sum(p_M, first, last, matrix, n_rows, entries, b_row, b_column, LD, b_entry, b_some):
    """Σ over slices first … last of M[slice, matrix], in that order. first, last, matrix: (rows,), per row of the tile."""
    b_total = tl.where(b_entry, 0.0, 0.0)  # of a loop's type
    for step in range(tl.max(tl.where(b_some, last - first, 0))):
        slot = first + step
        at = (slot.to(tl.int64) * n_rows + matrix) * entries + b_row * LD
        b_total += tl.load(p_M + at[:, None] + b_column[None, :], mask=b_entry & (slot < last)[:, None], other=0.0)
    return b_total


@triton.jit
def slice_trace(p_M, first, last, matrix, n_rows, entries, b_k, LD, b_inside, b_same, ONE: tl.constexpr):
    """(SIZE,) tr Σ M[slice, matrix] of each matrix: ‖F_ref‖² where the matrix is the reference's own."""
    b_total = tl.where(b_inside, 0.0, 0.0)  # ditto
    for step in range(tl.max(tl.where(b_inside, last - first, 0))):
        slot = first + step
        at = (slot.to(tl.int64) * n_rows + matrix) * entries + b_k * (LD + 1)
        b_total += tl.load(p_M + at, mask=b_inside & (slot < last), other=0.0)
    return sum_of_matrix(b_total, b_same, ONE)
