"""The Newton-Schulz coefficients, derived again from what they are meant to be."""

import numpy as np
import pytest
from scipy.optimize import linprog

from fedrot_kernels.schedule import CLASSIC, CLOSE, GROW, LONG, OPEN, PERTURB_AT, SCHEDULE, SHORT


def minimax_quintic(low: float, high: float) -> np.ndarray:
    """The odd quintic nearest 1 on [low, high], by linear programming on a fine grid."""
    x = np.unique(np.concatenate([np.geomspace(low, high, 4000), np.linspace(low, high, 4000)]))
    powers, ones = np.stack([x, x**3, x**5], 1), np.ones((len(x), 1))
    bounds = np.block([[powers, -ones], [-powers, -ones]])
    return linprog([0, 0, 0, 1], bounds, np.concatenate([ones, -ones]).ravel(), bounds=(None, None)).x[:3]


def apply(coefficients, x):
    a, b, c = coefficients
    return a * x + b * x**3 + c * x**5


def test_the_minimax_steps_are_polar_express_with_cushion_and_safety():
    low, high = 0.0, 1.0
    for step in (OPEN, GROW, None, *CLOSE):
        if step is None:  # after enough growth every σ lies in the band that CLOSE starts from
            low = 0.06534612
            continue
        expected = minimax_quintic(max(low, 0.02 * high), high) / 1.01 ** np.array([1, 3, 5])
        np.testing.assert_allclose(step, expected, rtol=1e-4)
        band = apply(step, np.linspace(max(low, 0.02 * high), high, 100_001))
        low, high = (low * step[0] if step in (OPEN, GROW) else band.min()), max(band.max(), 1.0)
    assert 1 - low < 0.03 and high - 1 < 0.03


@pytest.mark.parametrize(("smallest", "steps"), [(1 / 100, len(SHORT)), (1e-7, len(SHORT + LONG)), (7e-17, PERTURB_AT)])
def test_the_schedule_brings_every_singular_value_to_one(smallest, steps):
    x = np.geomspace(smallest, 1, 100_001)
    for step in SCHEDULE[:steps]:
        x = apply(step, x)
    assert np.abs(x**2 - 1).max() < 1e-3


def test_the_classic_step_converges_cubically():
    error = 1e-3
    assert abs(apply(CLASSIC, 1 + error) - 1) == pytest.approx(2.5 * error**3, rel=0.01)
