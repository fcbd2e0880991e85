"""raFLoRA (arXiv 2602.13486): ranks that few clients have, averaged over the clients that have them.

In a plain mean the rows of a factor that few clients have shrink by those clients' share of the weights, round after round.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters.layout import Adapter
from ..adapters.update import Update
from ..errors import UpdateError


def check_ranks_configured(clients: Sequence[Update]) -> None:
    """Raise UpdateError unless every client has a LoRA configuration, which says what its ranks are."""
    if lacking := next((client for client in clients if client.config is None), None):
        raise UpdateError(
            f'{lacking.name} has no LoRA configuration, and collapse="raflora" averages rows over the clients whose '
            "configured ranks have them; pass folders, or configs=[…]"
        )


def inverse_shares(adapter: Adapter, clients: Sequence[Update], shares: Sequence[float]) -> Tensor:
    """1 over the weight of the clients that have a row, for every row of an adapter; 0 for a row that none has.

    A block of rows is averaged with the weights N_k / N_h, N_h being the sum over the clients of at least its rank: that is
    the plain mean's weight N_k / N, divided by N_h / N.

    Args:
        adapter: the adapter, of the round's largest rank r.
        clients: the N clients, as they came.
        shares: their weights, summing to 1.

    Returns:
        (r,), float64, on the CPU.
    """
    own = torch.tensor([client.specs[adapter.key_A].shape[0] for client in clients], device="cpu")
    has = (torch.arange(adapter.rank, device="cpu")[:, None] < own).double()
    total = has @ torch.tensor(shares, dtype=torch.float64, device="cpu")
    return torch.where(total > 0, 1 / total.clamp(min=torch.finfo(torch.float64).tiny), 0)
