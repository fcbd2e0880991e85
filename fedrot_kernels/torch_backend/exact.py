"""Cross-covariances of a whole model in float64, for the few clients whose rotations need them."""

from collections.abc import Sequence

from torch import Tensor

from ..tolerances import FACTOR_FLOOR
from ..types import Clients
from .products import exact_cross_covariance


class ExactProducts:
    """M of one adapter and client at a time.

    Args:
        A, B, A_ref, B_ref: as in ``dispatch.align_average``.

    Attributes:
        floors: per adapter, the size relative to ‖M‖_F below which a direction says nothing.
    """

    def __init__(
        self,
        A: Sequence[Clients],
        B: Sequence[Clients],
        A_ref: Sequence[Tensor] | None,
        B_ref: Sequence[Tensor] | None,
    ):
        self._frames = (A, A_ref), (B, B_ref)
        refs = [refs for _, refs in self._frames if refs is not None]
        self.floors = [
            max(FACTOR_FLOOR[x.dtype] for x in (clients[0], *(of_factor[i] for of_factor in refs)))
            for i, clients in enumerate(A)
        ]

    def __call__(self, adapter: int, client: int) -> Tensor:
        """M (r, r), float64, on the CPU."""
        (A, A_ref), (B, B_ref) = self._frames
        frames = [] if A_ref is None else [(A[adapter][client], A_ref[adapter])]
        frames += [] if B_ref is None else [(B[adapter][client].mT, B_ref[adapter].mT)]
        return exact_cross_covariance(frames)
