"""Procrustes rotations of rank 32 at most: Newton–Schulz to convergence in registers, SO(r) and softening included."""

import triton
import triton.language as tl

from .launch import LaunchOptions
from .orthogonal import (
    CLASSIC_BELOW,
    CONVERGED,
    QUICK_STEPS,
    SOFTENING_FLOOR,
    SQUARINGS,
    WEAKEST_SHIFT,
    determinant_sign,
    longest_column,
    max_per_matrix,
    perturbation,
    slice_sum,
    squared_reference_norm,
    sum_per_matrix,
)


@triton.jit
def _newton_schulz(
    b_X, b_eye, b_perturbation, b_same, p_schedule, RP: tl.constexpr, STEPS: tl.constexpr, PERTURB_AT: tl.constexpr
):
    """Drive every singular value to 1. A matrix that has converged stays as it is while the others go on.

    Returns the result and the number of steps.
    """
    SIZE: tl.constexpr = b_X.shape[0]
    ONE: tl.constexpr = SIZE == RP
    b_going = sum_per_matrix(tl.sum(b_eye, 0), b_same, ONE) > 0  # all, of the type that a loop's variable keeps
    step = 0
    going = 1
    while going > 0:
        b_D = tl.dot(tl.trans(b_X), b_X, input_precision="ieee") - b_eye
        b_deviation = tl.sqrt(sum_per_matrix(tl.sum(b_D * b_D, 0), b_same, ONE))
        if step == PERTURB_AT:  # a matrix that is still far off is singular
            b_X += tl.where((b_going & (b_deviation > CLASSIC_BELOW))[None, :], b_perturbation, 0.0)
            b_D = tl.dot(tl.trans(b_X), b_X, input_precision="ieee") - b_eye
            b_deviation = tl.sqrt(sum_per_matrix(tl.sum(b_D * b_D, 0), b_same, ONE))
        at = tl.where(b_deviation < CLASSIC_BELOW, STEPS, step) * 3
        b_a, b_b, b_c = tl.load(p_schedule + at), tl.load(p_schedule + at + 1), tl.load(p_schedule + at + 2)
        b_DD = tl.dot(b_D, b_D, input_precision="ieee")
        b_Y = (b_b + 2.0 * b_c)[None, :] * b_D + b_c[None, :] * b_DD
        b_next = (b_a + b_b + b_c)[None, :] * b_X + tl.dot(b_X, b_Y, input_precision="ieee")
        b_X = tl.where(b_going[None, :], b_next, b_X)
        b_going = b_going & (b_deviation > CONVERGED)
        step += 1
        going = tl.where(step < STEPS, tl.max(b_going.to(tl.int32)), 0)
    return b_X, step


@triton.jit
def _orthogonalize(b_R, b_eye):
    """Take one Newton step to orthogonality, for a product of orthogonal matrices, which has been rounded."""
    b_D = tl.dot(tl.trans(b_R), b_R, input_precision="ieee") - b_eye
    return b_R - 0.5 * tl.dot(b_R, b_D, input_precision="ieee")


@triton.jit
def _flip_weakest(b_R, b_H, b_eye, b_k, b_entry, b_same, RP: tl.constexpr):
    """R (I − 2 v vᵀ) where det R < 0, v the weakest eigenvector of H = RᵀM, from powers of I − H; elsewhere R."""
    SIZE: tl.constexpr = b_H.shape[0]
    ONE: tl.constexpr = SIZE == RP
    b_flip = determinant_sign(b_R, b_k, b_same, RP, SIZE) < 0
    if tl.max(b_flip.to(tl.int32)) > 0:
        b_P = tl.where(b_entry, WEAKEST_SHIFT * b_eye - b_H, 0.0)  # zero in the padding, whose eigenvalues would compete
        for _ in range(SQUARINGS):
            b_P = tl.dot(b_P, b_P, input_precision="ieee")
            b_largest = max_per_matrix(tl.max(tl.abs(b_P), 0), b_same, ONE)
            b_P = b_P / tl.where(b_largest == 0, 1.0, b_largest)[None, :]
        b_v = longest_column(b_P, b_k, b_same, RP, SIZE)
        b_Rv = tl.sum(b_R * b_v[None, :], 1)
        b_flipped = _orthogonalize(b_R - 2.0 * tl.where(b_same, b_Rv[:, None] * b_v[None, :], 0.0), b_eye)
        b_R = tl.where(b_flip[None, :], b_flipped, b_R)
    return b_R


@triton.jit(do_not_specialize=["n_matrices", "n_clients", "n_rows", "LD", "joint", "reflections"])
def polar_kernel(
    p_M,
    p_R,
    p_residual,
    p_undetermined,
    p_adapters,
    p_schedule,
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
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    PERTURB_AT: tl.constexpr,
):
    """SIZE / RP rotations, of matrices numbered adapter by adapter, client by client; leading dimension LD.

    An adapter is (rank, first, last, first_B, last_B). The sum of its slices is M. Where both factors are aligned, the last
    two are the slices of B, and each sum is divided by the squared norm of its reference, which is client ``n_rows - 1``.

    There are at most five phases, because Newton–Schulz needs a full-rank start. First floor · I is added to M / ‖M‖_F, so
    that directions of zero map to the identity; this biases R by about the floor. The second phase, on RᵀM, which is nearly
    symmetric and positive definite, removes the bias, because adding a multiple of I does not change the polar factor of
    such a matrix. Without a floor it is the first one. The third counts eigenvalues of H = RᵀM below the floor, as those of
    −1 of the polar factor of H − floor · I, and flips. The last two soften, as the first two, because the blend may be
    singular. The constants and their reasons are in ``tolerances``.
    """
    ONE: tl.constexpr = SIZE == RP
    i = tl.arange(0, SIZE)
    b_k = i % RP
    matrix = tl.program_id(0) * (SIZE // RP) + i // RP
    exists = matrix < n_matrices
    adapter = p_adapters + matrix // n_clients * 5
    client = matrix % n_clients
    rank = tl.load(adapter, mask=exists, other=0)
    b_inside = b_k < rank
    b_same = (i // RP)[:, None] == (i // RP)[None, :]
    b_entry = b_same & b_inside[:, None] & b_inside[None, :]
    b_eye = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    entries = tl.cast(LD, tl.int64) * LD

    first, last = tl.load(adapter + 1, mask=exists, other=0), tl.load(adapter + 2, mask=exists, other=0)
    b_X = slice_sum(p_M, first, last, client, n_rows, entries, b_k, b_k, LD, b_entry, b_inside)
    if joint != 0:
        first_B, last_B = tl.load(adapter + 3, mask=exists, other=0), tl.load(adapter + 4, mask=exists, other=0)
        b_B = slice_sum(p_M, first_B, last_B, client, n_rows, entries, b_k, b_k, LD, b_entry, b_inside)
        own = n_rows - 1
        b_norm_A = squared_reference_norm(p_M, first, last, own, n_rows, entries, b_k, LD, b_inside, b_same, ONE)
        b_norm_B = squared_reference_norm(p_M, first_B, last_B, own, n_rows, entries, b_k, LD, b_inside, b_same, ONE)
        b_X = b_X / b_norm_A[:, None] + b_B / b_norm_B[:, None]

    b_finite = sum_per_matrix(tl.sum(tl.where(tl.abs(b_X) < float("inf"), 0.0, 1.0), 0), b_same, ONE) == 0
    b_X = tl.where(b_finite[None, :], b_X, 0.0)  # NaN times the zeros between matrices would spread
    b_largest = max_per_matrix(tl.max(tl.abs(b_X), 0), b_same, ONE)
    b_zero = b_largest == 0
    b_X = b_X / tl.where(b_zero, 1.0, b_largest)[None, :]
    b_norm = tl.sqrt(sum_per_matrix(tl.sum(b_X * b_X, 0), b_same, ONE))
    b_X = b_X / tl.where(b_zero, 1.0, b_norm)[None, :]
    # Padding becomes the identity, which converges with the rest. So does a matrix of zeros, which would take longest.
    b_X = tl.where(b_zero[None, :], b_eye, b_X + tl.where(b_inside[None, :], 0.0, b_eye))
    b_perturbation = tl.where(b_entry, perturbation(b_k, b_k), 0.0)

    b_R = b_eye
    b_undetermined = tl.where(b_inside, 0.0, 0.0)  # 0, of the type that a loop's variable keeps
    steps = 0
    for phase in range(tl.where(floor > 0, 0, 1), tl.where(strength < 1, 5, 3)):
        phase_floor = tl.where(phase < 2, floor, SOFTENING_FLOOR)
        if phase == 3:
            b_X = (1.0 - strength) * b_eye + strength * b_R
            b_R = b_eye
        b_H = tl.dot(tl.trans(b_R), b_X, input_precision="ieee")
        if phase == 2:
            counts = (floor > 0) & (steps > QUICK_STEPS)
            b_start = tl.where(counts, (b_H - floor * b_eye) / (1.0 + floor), b_eye)
        else:
            b_start = (b_H + tl.where(phase_floor > 0, phase_floor, shift) * b_eye) / (1.0 + 2.0 * phase_floor)
        b_turn, steps = _newton_schulz(b_start, b_eye, b_perturbation, b_same, p_schedule, RP, STEPS, PERTURB_AT)
        if phase == 2:
            b_trace = sum_per_matrix(tl.sum(tl.where(b_inside[None, :], b_turn * b_eye, 0.0), 0), b_same, ONE)
            b_undetermined = (rank - b_trace) / 2.0
            b_R = tl.where(b_zero[None, :], b_eye, b_R)  # exactly I, which the iteration misses by its rounding
            if reflections == 0:
                b_R = _flip_weakest(b_R, b_H, b_eye, b_k, b_entry, b_same, RP)
        else:
            b_R = tl.dot(b_R, b_turn, input_precision="ieee")
            if (phase == 4) | ((phase == 1) & (floor > 0)):
                b_R = _orthogonalize(b_R, b_eye)

    b_D = tl.abs(tl.dot(tl.trans(b_R), b_R, input_precision="ieee") - b_eye)
    b_residual = max_per_matrix(tl.max(b_D, 0), b_same, ONE)
    at = p_R + (matrix.to(tl.int64) * entries + b_k * LD)[:, None] + b_k[None, :]
    tl.store(at, tl.where(b_finite[None, :], b_R, float("nan")), mask=b_entry)
    b_undetermined = tl.where(b_zero & b_finite, rank, b_undetermined)
    tl.store(p_undetermined + matrix, (b_undetermined + 0.5).to(tl.int64), mask=exists & (b_k == 0))
    tl.store(p_residual + matrix, tl.where(b_finite, b_residual, float("nan")), mask=exists & (b_k == 0))


def options(RP: int, steps: int, perturb_at: int, backend: str) -> LaunchOptions:
    """Choose how to launch, for RP ≤ 32. Matrices of rank 4 and 8 share a tile of 16 × 16, the least of a product.

    One warp suffices on AMD, whose waves have twice as many lanes; with more, Triton 3.6 fails to compile RP = 32.
    """
    constants = {"RP": RP, "SIZE": max(RP, 16), "STEPS": steps, "PERTURB_AT": perturb_at}
    return LaunchOptions(constants, num_warps=4 if RP == 32 and backend == "cuda" else 1, num_stages=1)
