"""Polynomial coefficients (a, b, c) of the Newton–Schulz iteration X ← X (a I + b G + c G²), G = XᵀX.

A step maps each singular value σ to p(σ) = a σ + b σ³ + c σ⁵. ``CLASSIC`` converges cubically once every σ is near 1,
but a small σ grows only 1.875-fold per step. The other polynomials are minimax approximations of the constant 1 on a range
[l, u], composed greedily as in "The Polar Express" (arXiv 2505.16932), with two precautions. The bound l is never below
0.02 u, so that no σ inside the range is mapped near 0. Every polynomial is contracted by the factor 1.01, x → p(x / 1.01):
without it, rounding pushed σ beyond the range and the iteration to NaN at r = 64. ``tests/kernels/test_schedule.py`` derives
all coefficients again.
"""

Step = tuple[float, float, float]

CLASSIC: Step = (1.875, -1.25, 0.375)

# [0.02, 1] → [0.153, 1.846]; smaller σ grow 7.6-fold. Takes any matrix of Frobenius norm 1.
OPEN: Step = (7.63462312, -21.46339287, 15.46012167)
# [0.037, 1.846] → the same band, however often it is repeated; smaller σ grow 4.1-fold each time.
GROW: Step = (4.13586073, -3.41219061, 0.72128088)
# [0.065, 1.846] → [0.251, 1.746] → [0.665, 1.329] → [0.972, 1.024]
CLOSE: tuple[Step, ...] = (
    (3.85487695, -3.09444571, 0.64870945),
    (2.77573484, -2.03552523, 0.44530806),
    (1.98894672, -1.35712719, 0.37554795),
)

# The short stage is enough for condition numbers to about 100; client updates have 1 to 6. Matrices that have not converged
# take a long stage, which is enough for σ smaller by a factor of 2e7, then a second one for what rounding has left.
SHORT = (OPEN, *CLOSE, CLASSIC, CLASSIC)
LONG = (*[GROW] * 9, *CLOSE, CLASSIC, CLASSIC)
LONG_STAGES = 4
SCHEDULE = SHORT + LONG * LONG_STAGES

# A matrix that has not converged after two long stages is singular, and no multiple of I completes it: perturb it.
PERTURB_AFTER = 2
PERTURB_AT = len(SHORT + LONG * PERTURB_AFTER)
