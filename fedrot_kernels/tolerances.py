"""Every numerical constant of the algorithms, each with its reason. PyTorch and the Triton kernels both read them here.

The coefficients of the Newton–Schulz iteration are in ``schedule.py``. Block sizes are where they are used: they change how
fast a result is computed, not the result.
"""

import torch

CONVERGED = {torch.float32: 3e-3, torch.float64: 1e-5}
"""‖XᵀX − I‖_F at which the next classic step is the last: it leaves |σ − 1| ≤ 2.5 (tolerance / 2)³, below eps."""

CLASSIC_BELOW = 0.5
"""‖XᵀX − I‖_F below which the classic step converges by itself. A minimax step would move σ away from 1 again."""

COMPLETION_SHIFT = 4e-8
"""Multiple of I that the kernels add to M/‖M‖_F, so that a singular M is completed by the identity.

It is a third of float32's eps, which is below the singular values of a matrix of condition number 1e7 even in float32. There
a shift of 1e-5 would cost a Procrustes gap of up to 5e-4; this one costs at most 1e-6.
"""

FACTOR_FLOOR = {torch.float16: 1e-7, torch.bfloat16: 6e-6, torch.float32: 1e-10, torch.float64: 1e-14}
"""The size, relative to ‖M‖_F, below which a direction of M is left alone: by the factors' dtype, for an M from float64.

A null direction of both frames, such as that of a head of few classes, is left with the product of two roundings. One
rounding of each frame leaves up to eps²/30 ‖M‖_F, which is what the floors of half precision hold. Training in float32 adds
one rounding per step: 1e-10 holds 28,000 of them. The float64 product leaves up to 2.3 of its own eps. Rotated, such
directions would turn at random. A direction that only one of two frames lacks is of the size of one rounding, and rotates.
"""

PRODUCT_FLOOR = {dtype: 8 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
"""The same where M was computed in the dtype of the result: as the ``floor`` of ``polar``, and in the kernels.

In the null space of products of low rank, rounding left singular values of up to 1.2 eps ‖M‖_F for frames of up to 14,336
columns, 2.3 eps for 131,072 columns, and 1.5 eps where sums run over 512 terms one by one, as in the kernels.
"""

SOFTENING_FLOOR = 2e-6
"""The floor of the blend (1 − λ) I + λ R in the kernels, whose rotations are known to about 1e-6."""

HALF_TURN = 1e-7
"""The floor of the blend in float64: planes that R turns by 180° to within 2e-7 rad do not rotate at λ = 0.5.

R itself is known to eps of float64 over the smallest relative singular value of M, which is 1e-9 for real clients.
"""

SMALLEST_PRODUCT = 1e-30
"""The size of M's largest entry below which its float32 products may have underflowed."""

PERTURBATION = 1e-4
"""Factor of the perturbation of a matrix that has not converged when a regular matrix would have.

Such a matrix is singular, and no multiple of I completes it: it is nilpotent, for example. Turning the directions that
M determines by an angle θ costs a Procrustes gap of about θ². At rank 128 the perturbation's spectral norm is 6e-4.
"""

PERTURBATION_MULTIPLIER, PERTURBATION_BITS = 56269, 16
"""Entry (i, j) of the perturbation, i and j from 0, is the fraction of (2i + 1)(2j + 1) · 56269 / 2¹⁶, minus ½.

Float32 holds it exactly, and so it holds the products that lead to it up to rank 128: PyTorch and the kernels compute the
same bits without a table. Of 2,500 multipliers tried, this one keeps the smallest singular value of all leading r × r blocks
up to r = 128 furthest from 0: at 1.3e-3. Multiples of the golden ratio look as irregular; one of their blocks is singular.
"""

SQUARINGS = 20
"""Squarings of 1.001 I − H/‖H‖_F that leave the eigenvector of H's smallest eigenvalue.

Any unit vector gives det = +1 exactly, but only that one gives the rotation nearest to M. The power 2²⁰ tells eigenvalues
apart that differ by a few eps of ‖H‖_F. After ten squarings two weak ones were still mixed: R was off by 1e-2 to 3.
"""

WEAKEST_SHIFT = 1.001
"""Multiple of I from which H/‖H‖_F is subtracted before squaring. At rank 1, H/‖H‖_F is 1 and so the difference is not 0."""

SMALLEST_DIVISOR = 1e-30
"""Lower bound of squared norms before they divide, for a matrix of zeros in float32."""

WEIGHT_RANGE = 2.0**40
"""The largest weight, in units of the first client's, up to which that client's weight is the unit of a running sum.

Weights of one magnitude then give the same bits whether clients are summed at once or one by one. Float32 sums have room for
2⁴⁰ times the values; beyond it the largest weight becomes the unit.
"""

LARGEST_TRITON_RANK = 128
"""The largest rank with Triton kernels: its scratch, 384 KiB per multiprocessor, still fits an H200's L2 cache."""

EQUAL_ERRORS = 0.01
"""Relative difference up to which the predicted errors of two strengths count as equal."""

ERROR_ROUNDING = 1e-7
"""Rounding of a predicted error, relative to the update. A squared error is known to 1e-16 of the squared update."""

PREFERRED_STRENGTH = 0.5
"""λ to prefer among strengths whose errors count as equal: the default of FedRot-LoRA."""

CURVATURE_RIDGE = 0.1
"""Multiple of the mean curvature that is added to every direction's, so that no flat direction takes an unbounded step."""
