"""FedIT (arXiv 2305.05644): the mean of A and the mean of B."""

from .averaging import average_round
from .base import Method
from .round import Averages, Round


class FedIT(Method):
    """Averages the factors as they come."""

    name = "fedit"
    paper = "arXiv 2305.05644"
    cost = "N r d"
    exact = "when all clients share A or B"

    def aggregate(self, round: Round) -> Averages:
        """See ``Method.aggregate``."""
        return average_round(round, self.options)
