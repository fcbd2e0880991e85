"""FedIT (arXiv 2305.05644): the mean of A and the mean of B."""

from .base import Method


class FedIT(Method):
    """Averages the factors as they come."""

    name = "fedit"
    rotates = False

    def aligned_on(self, round):
        return ()
