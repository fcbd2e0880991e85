"""Polynomial coefficients (a, b, c) of the Newton-Schulz iteration X <- X (a I + b G + c G²), G = XᵀX.

On each singular value a step acts as p(σ) = a σ + b σ³ + c σ⁵. ``CLASSIC`` converges cubically once every σ is near 1,
but a small σ grows only 1.875-fold a step. The others are minimax approximations of the constant 1 on a range
[l, u], composed greedily as in "The Polar Express" (arXiv 2505.16932): l never below 0.02 u, so that no σ inside the
range is sent near 0, and every polynomial contracted by the factor 1.01, x -> p(x / 1.01), without which rounding
pushed σ beyond the range and the iteration to NaN at r = 64. ``tests/test_schedule.py`` derives them again.
"""

CLASSIC = (1.875, -1.25, 0.375)

# [0.02, 1] -> [0.153, 1.846]; what is smaller grows 7.6-fold. Takes any matrix of Frobenius norm 1.
OPEN = (7.63462312, -21.46339287, 15.46012167)
# [0.037, 1.846] -> the same band; what is smaller grows 4.1-fold, as often as it is repeated.
GROW = (4.13586073, -3.41219061, 0.72128088)
# [0.065, 1.846] -> [0.251, 1.746] -> [0.665, 1.329] -> [0.972, 1.024]
CLOSE = (
    (3.85487695, -3.09444571, 0.64870945),
    (2.77573484, -2.03552523, 0.44530806),
    (1.98894672, -1.35712719, 0.37554795),
)

# The short way is enough for condition numbers to about 100 (client updates have 1 to 6). Matrices that have not
# converged go the long way, which takes σ smaller by a factor of 2e7, and again, which takes all that rounding leaves.
SHORT = (OPEN, *CLOSE, CLASSIC, CLASSIC)
LONG = (*[GROW] * 9, *CLOSE, CLASSIC, CLASSIC)
SCHEDULE = SHORT + LONG * 4

# What has not converged by this step is singular, and no multiple of I completes it (a nilpotent matrix): perturb it.
PERTURB_AT = len(SHORT + LONG * 2)
PERTURBATION = 1e-4  # costs a Procrustes gap of about its square
