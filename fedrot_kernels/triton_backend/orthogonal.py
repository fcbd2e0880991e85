"""Steps on small square matrices in registers, one or several per program, for both polar kernels.

A tile (SIZE, SIZE) holds SIZE / RP matrices on its diagonal, each RP × RP; ``b_same`` is true where an entry belongs to one
of them. A number per matrix is a vector over the tile's rows or columns, or of length one if there is one matrix.
"""

import torch
import triton
import triton.language as tl

from .. import tolerances
from ..schedule import SHORT

# Kernels read globals only if they are constexpr.
CONVERGED = tl.constexpr(tolerances.CONVERGED[torch.float32])
CLASSIC_BELOW = tl.constexpr(tolerances.CLASSIC_BELOW)
SOFTENING_FLOOR = tl.constexpr(tolerances.SOFTENING_FLOOR)
QUICK_STEPS = tl.constexpr(len(SHORT) + 2)  # steps within which matrices converge that have no σ near the floor
SQUARINGS = tl.constexpr(tolerances.SQUARINGS)
WEAKEST_SHIFT = tl.constexpr(tolerances.WEAKEST_SHIFT)
SMALLEST_DIVISOR = tl.constexpr(tolerances.SMALLEST_DIVISOR)
_PERTURBATION = tl.constexpr(tolerances.PERTURBATION)
_MULTIPLE = tl.constexpr(tolerances.PERTURBATION_MULTIPLIER / 2**tolerances.PERTURBATION_BITS)


@triton.jit
def sum_per_matrix(b_x, b_same, ONE: tl.constexpr):
    """(SIZE,) per row or column → the sum over each matrix."""
    return tl.sum(b_x, 0, keep_dims=True) if ONE else tl.sum(tl.where(b_same, b_x[None, :], 0.0), 1)


@triton.jit
def max_per_matrix(b_x, b_same, ONE: tl.constexpr):
    """(SIZE,) of non-negative numbers → the largest of each matrix."""
    return tl.max(b_x, 0, keep_dims=True) if ONE else tl.max(tl.where(b_same, b_x[None, :], 0.0), 1)


@triton.jit
def first_per_matrix(b_where, b_k, b_same, ONE: tl.constexpr, SIZE: tl.constexpr):
    """(SIZE,) conditions → the smallest index k within each matrix at which one holds."""
    b_index = tl.where(b_where, b_k, SIZE)
    return tl.min(b_index, 0, keep_dims=True) if ONE else tl.min(tl.where(b_same, b_index[None, :], SIZE), 1)


@triton.jit
def perturbation(b_i, b_j):
    """Entries (i, j) of the fixed matrix that is added to singular ones; see ``tolerances``."""
    b_row = (2 * b_i + 1).to(tl.float32) * _MULTIPLE
    b_row = b_row - tl.floor(b_row)
    b_x = b_row[:, None] * (2 * b_j + 1).to(tl.float32)[None, :]  # exact, because only whole numbers were left out
    # The constexpr comes last: times a tensor, it is another constexpr in the interpreter.
    return (b_x - tl.floor(b_x) - 0.5) * _PERTURBATION


@triton.jit
def determinant_sign(b_R, b_k, b_same, RP: tl.constexpr, SIZE: tl.constexpr):
    """The sign of each determinant, by elimination with row pivots: signs of the pivots times that of the row order."""
    ONE: tl.constexpr = SIZE == RP
    b_sign = tl.where(
        sum_per_matrix(tl.sum(b_R * b_R, 0), b_same, ONE) >= 0, 1.0, 1.0
    )  # 1, of the type that a loop's variable keeps
    b_left = b_k >= 0  # the rows without a pivot yet
    for column in range(RP):
        b_column = tl.sum(tl.where(b_same & (b_k == column)[None, :], b_R, 0.0), 1)
        b_size = tl.where(b_left, tl.abs(b_column), 0.0)
        b_pivot_row = first_per_matrix(b_left & (b_size == max_per_matrix(b_size, b_same, ONE)), b_k, b_same, ONE, SIZE)
        b_is_pivot = b_k == b_pivot_row
        b_pivot = sum_per_matrix(tl.where(b_is_pivot, b_column, 0.0), b_same, ONE)
        b_above = sum_per_matrix(tl.where(b_left & (b_k < b_pivot_row), 1.0, 0.0), b_same, ONE)
        b_sign *= tl.where(b_pivot < 0, -1.0, 1.0) * (1.0 - 2.0 * (b_above.to(tl.int32) % 2).to(tl.float32))
        b_left = b_left & (b_k != b_pivot_row)
        b_factor = b_column / tl.where(b_pivot == 0, 1.0, b_pivot)  # one in the pivot's row, which becomes zero
        b_row = tl.sum(tl.where(b_same & b_is_pivot[:, None], b_R, 0.0), 0)
        b_R = tl.where(b_same, b_R - b_factor[:, None] * b_row[None, :], 0.0)
    return b_sign


@triton.jit
def longest_column(b_P, b_k, b_same, RP: tl.constexpr, SIZE: tl.constexpr):
    """(SIZE,) The longest column of each matrix, scaled to length one."""
    ONE: tl.constexpr = SIZE == RP
    b_length = tl.sum(b_P * b_P, 0)
    b_column = first_per_matrix(b_length == max_per_matrix(b_length, b_same, ONE), b_k, b_same, ONE, SIZE)
    b_v = tl.sum(tl.where(b_same & (b_k == b_column)[None, :], b_P, 0.0), 1)
    b_largest = max_per_matrix(tl.abs(b_v), b_same, ONE)
    b_v = b_v / tl.where(b_largest == 0, 1.0, b_largest)
    b_norm = sum_per_matrix(b_v * b_v, b_same, ONE)
    return b_v / tl.sqrt(tl.where(b_norm == 0, 1.0, b_norm))


@triton.jit
def slice_sum(p_M, first, last, matrix, n_rows, entries, b_row, b_column, LD, b_entry, b_some):
    """Σ over slices first … last of M[slice, matrix], in that order. first, last, matrix: (rows,), per row of the tile."""
    b_total = tl.where(b_entry, 0.0, 0.0)  # 0, of the type that a loop's variable keeps
    for step in range(tl.max(tl.where(b_some, last - first, 0))):
        slot = first + step
        at = (slot.to(tl.int64) * n_rows + matrix) * entries + b_row * LD
        b_total += tl.load(p_M + at[:, None] + b_column[None, :], mask=b_entry & (slot < last)[:, None], other=0.0)
    return b_total


@triton.jit
def squared_reference_norm(p_M, first, last, matrix, n_rows, entries, b_k, LD, b_inside, b_same, ONE: tl.constexpr):
    """(SIZE,) ‖F_ref‖² = tr Σ M[slice, matrix] of each matrix, the reference's own; 1 where it is zero, as a divisor."""
    b_total = tl.where(b_inside, 0.0, 0.0)  # 0, of the type that a loop's variable keeps
    for step in range(tl.max(tl.where(b_inside, last - first, 0))):
        slot = first + step
        at = (slot.to(tl.int64) * n_rows + matrix) * entries + b_k * (LD + 1)
        b_total += tl.load(p_M + at, mask=b_inside & (slot < last), other=0.0)
    b_norm = sum_per_matrix(b_total, b_same, ONE)
    return tl.where(b_norm == 0, 1.0, b_norm)
