"""What is kept of a round's updates while they are added one by one."""

from torch import Tensor

from .adapters import Layout
from .averaging import RunningMean
from .diagnostics import rotation_angle
from .report import AdapterReport
from .updates import StateDict, Update


class Stream:
    """A round's clients so far: their names, weights and angles, and the sums of their tensors.

    Args:
        first: the first client, whose keys and shapes the others must have.
        layout: of its update.
        reference: what clients are aligned to, or None.
    """

    def __init__(
        self,
        first: Update,
        layout: Layout,
        reference: Update | None,
    ):
        self.first, self.layout, self.reference = first.without_tensors(), layout, reference
        self.frozen: dict[str, Tensor] = {}
        self.dropped: dict[str, str] = {}
        self.clients: list[str] = []
        self.weights: list[float] = []
        self.angles: dict[str, list[float]] = {a.key_A: [] for a in layout.adapters}
        self.mean = RunningMean(layout, first.device)

    @property
    def seen(self) -> int:
        return len(self.clients) + len(self.dropped)

    def add(self, client: Update, weight: float, tensors: StateDict, rotations: list[Tensor] | None) -> None:
        self.mean.add(tensors, weight, rotations)
        self.clients.append(client.name)
        self.weights.append(weight)
        for g, batch in enumerate(self.layout.batches):
            angles = rotation_angle(rotations[g]).tolist() if rotations else [0.0] * len(batch.adapters)
            for a, angle in zip(batch.adapters, angles, strict=True):
                self.angles[a.key_A].append(angle)

    def adapter_reports(self) -> tuple[AdapterReport, ...]:
        """Of every adapter, without the error: the factors it is computed from have not been kept."""
        return tuple(AdapterReport(a.module, a.rank, None, None, tuple(self.angles[a.key_A])) for a in self.layout.adapters)
