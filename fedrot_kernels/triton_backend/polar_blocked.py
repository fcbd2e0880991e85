"""Procrustes rotations of rank 33 to 128, whose matrices fit no register file.

The iteration is that of ``polar.py``, on scratch memory that stays in the L2 cache, product by product in blocks.
"""

import triton
import triton.language as tl

from .launch import LaunchOptions, precision
from .orthogonal import (
    CLASSIC_BELOW,
    CONVERGED,
    QUICK_STEPS,
    SMALLEST_DIVISOR,
    SOFTENING_FLOOR,
    SQUARINGS,
    WEAKEST_SHIFT,
    perturbation,
    slice_sum,
    squared_reference_norm,
)

_BUFFERS = tl.constexpr(6)  # matrices of scratch per program
BUFFERS = _BUFFERS.value
_ROWS = tl.constexpr(32)  # rows of a matrix that are in registers at a time in entrywise work


@triton.jit
def _product(
    p_out,
    p_x,
    p_y,
    p_add,
    scale,
    add,
    identity,
    RP: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute out = scale · xy + add · a + identity · I, with xᵀ if TRANSPOSE. out is none of the others.

    Returns ‖out‖²_F.
    """
    squares = 0.0
    for block in tl.range((RP // BLOCK) * (RP // BLOCK), disable_licm=True):
        i = block // (RP // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        j = block % (RP // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        b_out = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, RP, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            if TRANSPOSE:
                b_x = tl.trans(tl.load(p_x + k[:, None] * RP + i[None, :]))
            else:
                b_x = tl.load(p_x + i[:, None] * RP + k[None, :])
            b_y = tl.load(p_y + k[:, None] * RP + j[None, :])
            b_out = tl.dot(b_x, b_y, b_out, input_precision=PRECISION)
        b_out = scale * b_out + tl.where(i[:, None] == j[None, :], identity, 0.0)
        if ADD:
            b_out += add * tl.load(p_add + i[:, None] * RP + j[None, :])
        tl.store(p_out + i[:, None] * RP + j[None, :], b_out)
        squares += tl.sum(b_out * b_out)
    tl.debug_barrier()
    return squares


@triton.jit
def _blend(p_out, p_x, scale, identity, RP: tl.constexpr):
    """Compute out = scale · x + identity · I entry by entry; x may be out. Returns ‖out‖²_F."""
    j = tl.arange(0, RP)
    squares = 0.0
    for start in tl.range(0, RP, _ROWS, disable_licm=True):
        i = start + tl.arange(0, _ROWS)
        at = i[:, None] * RP + j[None, :]
        b_out = scale * tl.load(p_x + at) + tl.where(i[:, None] == j[None, :], identity, 0.0)
        tl.store(p_out + at, b_out)
        squares += tl.sum(b_out * b_out)
    tl.debug_barrier()
    return squares


@triton.jit
def _pad(p_out, first, diagonal, RP: tl.constexpr):
    """Write diagonal · I from row and column ``first`` on; the entries before them stay."""
    j = tl.arange(0, RP)
    for start in tl.range(0, RP, _ROWS, disable_licm=True):
        i = start + tl.arange(0, _ROWS)
        b_where = (i[:, None] >= first) | (j[None, :] >= first)
        tl.store(p_out + i[:, None] * RP + j[None, :], tl.where(i[:, None] == j[None, :], diagonal, 0.0), mask=b_where)
    tl.debug_barrier()


@triton.jit
def _determinant_sign(p_W, p_column, RP: tl.constexpr):
    """The sign of det W, by elimination with row pivots: signs of the pivots times that of the row order. Destroys W."""
    k = tl.arange(0, RP)
    b_left = k >= 0  # the rows without a pivot yet; the others have become zero
    sign = 1.0
    for column in tl.range(RP, disable_licm=True):
        b_column = tl.load(p_W + k * RP + column)
        b_size = tl.where(b_left, tl.abs(b_column), -1.0)
        row = tl.min(tl.where(b_size == tl.max(b_size), k, RP))
        pivot = tl.sum(tl.where(k == row, b_column, 0.0))
        above = tl.sum(tl.where(b_left & (k < row), 1, 0))
        sign *= tl.where(pivot < 0, -1.0, 1.0) * (1.0 - 2.0 * (above % 2))
        b_left = b_left & (k != row)
        tl.store(p_column + k, b_column / tl.where(pivot == 0, 1.0, pivot))
        b_row = tl.load(p_W + row * RP + k)
        tl.debug_barrier()
        for start in tl.range(0, RP, _ROWS, disable_licm=True):
            i = start + tl.arange(0, _ROWS)
            at = i[:, None] * RP + k[None, :]
            tl.store(p_W + at, tl.load(p_W + at) - tl.load(p_column + i)[:, None] * b_row[None, :])
        tl.debug_barrier()
    return sign


@triton.jit
def _perturb(p_X, RP: tl.constexpr):
    """Add the fixed perturbation to X."""
    j = tl.arange(0, RP)
    for start in tl.range(0, RP, _ROWS, disable_licm=True):
        i = start + tl.arange(0, _ROWS)
        at = i[:, None] * RP + j[None, :]
        tl.store(p_X + at, tl.load(p_X + at) + perturbation(i, j))
    tl.debug_barrier()


@triton.jit
def _newton_schulz(
    p_X,
    p_D,
    p_Y,
    p_next,
    p_schedule,
    RP: tl.constexpr,
    STEPS: tl.constexpr,
    PERTURB_AT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Drive every singular value of X to 1, in place. Returns the number of steps."""
    step = 0
    going = 1
    while going > 0:
        squares = _product(p_D, p_X, p_X, p_X, 1.0, 0.0, -1.0, RP, True, False, BLOCK, BLOCK_K, PRECISION)
        # A matrix that is still far off by then is singular.
        if (step == PERTURB_AT) & (squares > CLASSIC_BELOW * CLASSIC_BELOW):
            _perturb(p_X, RP)
            squares = _product(p_D, p_X, p_X, p_X, 1.0, 0.0, -1.0, RP, True, False, BLOCK, BLOCK_K, PRECISION)
        p_abc = p_schedule + tl.where(squares < CLASSIC_BELOW * CLASSIC_BELOW, STEPS, step) * 3
        a, b, c = tl.load(p_abc), tl.load(p_abc + 1), tl.load(p_abc + 2)
        _product(p_Y, p_D, p_D, p_D, c, b + 2.0 * c, 0.0, RP, False, True, BLOCK, BLOCK_K, PRECISION)
        _product(p_next, p_X, p_Y, p_X, 1.0, a + b + c, 0.0, RP, False, True, BLOCK, BLOCK_K, PRECISION)
        _blend(p_X, p_next, 1.0, 0.0, RP)
        step += 1
        going = tl.where((squares > CONVERGED * CONVERGED) & (step < STEPS), 1, 0)
    return step


@triton.jit
def _trace(p_X, rank, RP: tl.constexpr):
    """The sum of the first ``rank`` entries of X's diagonal."""
    k = tl.arange(0, RP)
    return tl.sum(tl.load(p_X + k * (RP + 1), mask=k < rank, other=0.0))


@triton.jit
def _normalize(p_X, p_M, adapter, client, n_rows, LD, joint, RP: tl.constexpr):
    """Compute X = M / ‖M‖_F, padded with the identity. M = 0 gives I, and so does a matrix that is not finite.

    Returns the largest entry of M and whether M is finite.
    """
    k = tl.arange(0, RP)
    rank = tl.load(adapter)
    entries = tl.cast(LD, tl.int64) * LD
    first, last = tl.load(adapter + 1), tl.load(adapter + 2)
    first_B, last_B = tl.load(adapter + 3), tl.load(adapter + 4)
    scale_A, scale_B = 1.0, 0.0
    if joint != 0:
        own = n_rows - 1
        b_one = k * 0
        b_in = k < rank
        b_norm_A = squared_reference_norm(p_M, b_one + first, b_one + last, own, n_rows, entries, k, LD, b_in, b_in, True)
        b_norm_B = squared_reference_norm(
            p_M, b_one + first_B, b_one + last_B, own, n_rows, entries, k, LD, b_in, b_in, True
        )
        scale_A, scale_B = tl.sum(b_norm_A), tl.sum(b_norm_B)
    largest, wrong = 0.0, 0
    for start in tl.range(0, RP, _ROWS, disable_licm=True):
        i = start + tl.arange(0, _ROWS)
        b_row = i * 0
        b_entry = (i < rank)[:, None] & (k < rank)[None, :]
        b_M = slice_sum(p_M, b_row + first, b_row + last, client, n_rows, entries, i, k, LD, b_entry, i < rank)
        if joint != 0:
            b_B = slice_sum(p_M, b_row + first_B, b_row + last_B, client, n_rows, entries, i, k, LD, b_entry, i < rank)
            b_M = b_M / scale_A + b_B / scale_B
        b_finite = tl.abs(b_M) < float("inf")
        wrong += tl.sum(tl.where(b_finite, 0, 1))
        b_M = tl.where(b_finite, b_M, 0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(b_M)))
        tl.store(p_X + i[:, None] * RP + k[None, :], b_M)
    tl.debug_barrier()
    finite = wrong == 0
    empty = (largest == 0) | (wrong > 0)
    squares = _blend(p_X, p_X, 1.0 / tl.where(empty, 1.0, largest), 0.0, RP)
    _blend(p_X, p_X, 1.0 / tl.sqrt(tl.where(empty, 1.0, squares)), 0.0, RP)
    _pad(p_X, tl.where(empty, 0, rank), 1.0, RP)
    return largest, finite


@triton.jit
def _flip_weakest(
    p_R,
    p_X,
    p_P,
    p_Q,
    rank,
    RP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """R ← R (I − 2 v vᵀ), v the weakest eigenvector of H = RᵀX, from powers of I − H."""
    k = tl.arange(0, RP)
    squares = _product(p_P, p_R, p_X, p_X, -1.0, 0.0, WEAKEST_SHIFT, RP, True, False, BLOCK, BLOCK_K, PRECISION)
    _pad(p_P, rank, 0.0, RP)  # whose eigenvalues would compete
    for _ in range(SQUARINGS // 2):  # two squarings each, scaled by the norm that the last one left
        scale = 1.0 / tl.maximum(squares, SMALLEST_DIVISOR)
        squares = _product(p_Q, p_P, p_P, p_P, scale, 0.0, 0.0, RP, False, False, BLOCK, BLOCK_K, PRECISION)
        scale = 1.0 / tl.maximum(squares, SMALLEST_DIVISOR)
        squares = _product(p_P, p_Q, p_Q, p_Q, scale, 0.0, 0.0, RP, False, False, BLOCK, BLOCK_K, PRECISION)
    b_length = tl.zeros((RP,), tl.float32)
    for start in tl.range(0, RP, _ROWS, disable_licm=True):
        b_P = tl.load(p_P + (start + tl.arange(0, _ROWS))[:, None] * RP + k[None, :])
        b_length += tl.sum(b_P * b_P, 0)
    column = tl.min(tl.where(b_length == tl.max(b_length), k, RP))
    b_v = tl.load(p_P + k * RP + column)
    b_v = b_v / tl.sqrt(tl.maximum(tl.sum(b_v * b_v), SMALLEST_DIVISOR))
    for start in tl.range(0, RP, _ROWS, disable_licm=True):
        at = (start + tl.arange(0, _ROWS))[:, None] * RP + k[None, :]
        b_R = tl.load(p_R + at)
        tl.store(p_R + at, b_R - 2.0 * tl.sum(b_R * b_v[None, :], 1)[:, None] * b_v[None, :])
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n_matrices", "n_clients", "n_rows", "LD", "joint", "reflections"])
def polar_blocked_kernel(
    p_M,
    p_R,
    p_residual,
    p_undetermined,
    p_adapters,
    p_schedule,
    p_scratch,
    n_matrices,
    n_clients,
    n_rows,
    LD,
    joint,
    reflections,
    floor,
    shift,
    strength,
    RP: tl.constexpr,
    STEPS: tl.constexpr,
    PERTURB_AT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute rotations one after the other, as many programs at once as there is scratch for.

    Arguments as in ``polar_kernel``.
    """
    p_X = p_scratch + tl.program_id(0).to(tl.int64) * (_BUFFERS * RP * RP)
    p_here, p_turn, p_D = p_X + RP * RP, p_X + 2 * RP * RP, p_X + 3 * RP * RP
    p_Y, p_next = p_X + 4 * RP * RP, p_X + 5 * RP * RP
    k = tl.arange(0, RP)
    for matrix in tl.range(tl.program_id(0), n_matrices, tl.num_programs(0), disable_licm=True):
        adapter = p_adapters + matrix // n_clients * 5
        rank = tl.load(adapter)
        largest, finite = _normalize(p_X, p_M, adapter, matrix % n_clients, n_rows, LD, joint, RP)
        _pad(p_here, 0, 1.0, RP)
        undetermined = 0.0
        steps = 0
        # The phases of ``polar_kernel``.
        for phase in tl.range(tl.where(floor > 0, 0, 1), tl.where(strength < 1, 5, 3), disable_licm=True):
            phase_floor = tl.where(phase < 2, floor, SOFTENING_FLOOR)
            if phase == 3:
                _blend(p_X, p_here, strength, 1.0 - strength, RP)
                _pad(p_here, 0, 1.0, RP)
            shifted = tl.where(phase == 2, -floor, tl.where(phase_floor > 0, phase_floor, shift))
            scale = 1.0 / (1.0 + tl.where(phase == 2, floor, 2.0 * phase_floor))
            _product(p_turn, p_here, p_X, p_X, scale, 0.0, shifted * scale, RP, True, False, BLOCK, BLOCK_K, PRECISION)
            if (phase == 2) & ((floor == 0) | (steps <= QUICK_STEPS)):
                _pad(p_turn, 0, 1.0, RP)
            steps = _newton_schulz(p_turn, p_D, p_Y, p_next, p_schedule, RP, STEPS, PERTURB_AT, BLOCK, BLOCK_K, PRECISION)
            if phase == 2:
                undetermined = (rank - _trace(p_turn, rank, RP)) / 2.0
                _pad(p_turn, 0, 1.0, RP)
            _product(p_next, p_here, p_turn, p_X, 1.0, 0.0, 0.0, RP, False, False, BLOCK, BLOCK_K, PRECISION)
            if (phase == 2) & (reflections == 0):
                _blend(p_Y, p_next, 1.0, 0.0, RP)
                if _determinant_sign(p_Y, p_turn, RP) < 0:
                    _flip_weakest(p_next, p_X, p_Y, p_turn, rank, RP, BLOCK, BLOCK_K, PRECISION)
            # One Newton step to orthogonality, because products of orthogonal matrices have been rounded.
            _product(p_D, p_next, p_next, p_X, 1.0, 0.0, -1.0, RP, True, False, BLOCK, BLOCK_K, PRECISION)
            _product(p_here, p_next, p_D, p_next, -0.5, 1.0, 0.0, RP, False, True, BLOCK, BLOCK_K, PRECISION)
            if (phase == 2) & (largest == 0):
                _pad(p_here, 0, 1.0, RP)  # exactly I, which the iteration misses by its rounding
        _product(p_D, p_here, p_here, p_X, 1.0, 0.0, -1.0, RP, True, False, BLOCK, BLOCK_K, PRECISION)
        residual = 0.0
        for start in tl.range(0, RP, _ROWS, disable_licm=True):
            i = start + tl.arange(0, _ROWS)
            at = i[:, None] * RP + k[None, :]
            residual = tl.maximum(residual, tl.max(tl.abs(tl.load(p_D + at))))
            p_out = p_R + tl.cast(matrix, tl.int64) * LD * LD + i[:, None] * LD + k[None, :]
            b_R = tl.where(finite, tl.load(p_here + at), float("nan"))
            tl.store(p_out, b_R, mask=(i < rank)[:, None] & (k < rank)[None, :])
        undetermined = tl.where((largest == 0) & finite, rank, undetermined)
        tl.store(p_undetermined + matrix, (undetermined + 0.5).to(tl.int64))
        tl.store(p_residual + matrix, tl.where(finite, residual, float("nan")))
        tl.debug_barrier()


def options(RP: int, steps: int, perturb_at: int, backend: str) -> LaunchOptions:
    """Choose how to launch, for RP 64 and 128.

    Emulated on the spectra of the tests, tf32x3 ends at ‖RᵀR − I‖_max = 7e-7.
    """
    constants = {
        "RP": RP,
        "STEPS": steps,
        "PERTURB_AT": perturb_at,
        "BLOCK": 64,
        "BLOCK_K": 16,
        "PRECISION": precision(backend),
    }
    return LaunchOptions(constants, num_warps=8, num_stages=1)
