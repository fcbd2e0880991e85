"""FedIT (arXiv 2305.05644): the mean of A and the mean of B."""

from .averaging import average_round
from .base import Method


class FedIT(Method):
    """Averages the factors as they come."""

    name = "fedit"
    paper = "arXiv 2305.05644"
    cost = "N r d"
    exact = "when all clients share A or B"

    def aggregate(self, round):
        return average_round(round.layout, round.clients, round.weights, None, (), self.alignment, round.backend)
