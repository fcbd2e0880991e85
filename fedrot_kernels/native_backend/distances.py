"""Inner products of clients' updates of a whole model in one call, adapter by adapter, without a copy of the inputs."""

import torch
from torch import Tensor

from ..checks import count_clients
from ..types import Factors
from .call import Call


def measure_products(A: Factors, B: Factors, instructions: str | None = None) -> tuple[Tensor, Tensor]:
    """Compute ⟨Eᵢ, Eⱼ⟩ of checked factors on a CPU; see ``distances.squared_distances``.

    Args:
        A, B: as there, of one rank per adapter.
        instructions: as in ``whole_model.align_average``.

    Returns:
        (L, N, N), and (L, N) what their rounding is relative to, uᵢ², both float64.
    """
    call, n = Call(A, B, instructions), count_clients(A)
    products = torch.zeros(len(A), n, n, dtype=torch.float64, device="cpu")
    sizes = torch.zeros(len(A), n, dtype=torch.float64, device="cpu")
    call.set(products=products, sizes=sizes)
    call.run()
    return products, sizes
