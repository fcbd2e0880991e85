"""What an aggregation did, adapter by adapter and client by client."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fedrot_kernels import full_precision

from .adapters import Adapter, Layout
from .diagnostics import aggregation_error
from .updates import StateDict


@dataclass(frozen=True)
class AdapterReport:
    """One adapter.

    Attributes:
        module: the adapted module.
        rank: r.
        error: the aggregation error ‖Σ wᵢBᵢAᵢ − B̄Ā‖_F after rotation (scaling left out); None in a stream, which has
            not kept the factors it would be computed from.
        update_norm: ‖Σ wᵢBᵢAᵢ‖_F; None in a stream.
        angles: by how many degrees each client used was rotated.
    """

    module: str
    rank: int
    error: float | None
    update_norm: float | None
    angles: tuple[float, ...]

    @property
    def relative_error(self) -> float | None:
        """error / update_norm; 0 where both are 0."""
        return None if self.error is None else _ratio(self.error, self.update_norm)


@dataclass(frozen=True)
class Report:
    """An aggregation.

    Attributes:
        method: its name in the registry.
        round: the round it was for.
        clients: the clients that were averaged.
        weights: their weights, summing to 1.
        dropped: client → why it was left out.
        adapters: one report each.
    """

    method: str
    round: int
    clients: tuple[str, ...]
    weights: tuple[float, ...]
    dropped: dict[str, str]
    adapters: tuple[AdapterReport, ...]

    @property
    def error(self) -> float | None:
        """The aggregation error of the whole model: the root of the sum of squares over adapters."""
        errors = [a.error for a in self.adapters if a.error is not None]
        return math.hypot(*errors) if len(errors) == len(self.adapters) else None

    @property
    def relative_error(self) -> float | None:
        """The whole model's aggregation error over the whole model's update norm."""
        return None if self.error is None else _ratio(self.error, math.hypot(*(a.update_norm or 0 for a in self.adapters)))

    @property
    def angle(self) -> float:
        """The mean rotation angle over adapters and clients, in degrees."""
        angles = [angle for a in self.adapters for angle in a.angles]
        return sum(angles) / len(angles)

    def as_dict(self) -> dict[str, Any]:
        """Plain Python data, for JSON."""
        return asdict(self) | {"error": self.error, "relative_error": self.relative_error, "angle": self.angle}

    def __str__(self) -> str:
        lines = [f"{'adapter':<60} {'rank':>4} {'error':>10} {'relative':>9} {'mean angle':>11} {'max angle':>10}"]
        for a in self.adapters:
            mean = sum(a.angles) / len(a.angles)
            lines.append(
                f"{_short(a.module):<60} {a.rank:>4} {_number(a.error, '10.3e')} {_number(a.relative_error, '9.4f')} "
                f"{mean:>10.1f}° {max(a.angles):>9.1f}°"
            )
        lines.append(
            f"{f'all {len(self.adapters)} adapters':<60} {'':>4} {_number(self.error, '10.3e')} "
            f"{_number(self.relative_error, '9.4f')} {self.angle:>10.1f}°"
        )
        lines.append(f"{self.method}, round {self.round}, {len(self.clients)} clients averaged")
        lines += [f"dropped {client}: {why}" for client, why in self.dropped.items()]
        return "\n".join(lines)


@full_precision
def adapter_reports(
    layout: Layout,
    clients: Sequence[StateDict],
    weights: Sequence[float],
    rotations: Sequence[Tensor] | None,
    angles: Mapping[str, Sequence[float]],
) -> tuple[AdapterReport, ...]:
    """Measure every adapter of an aggregation, one at a time.

    Args:
        layout: of the updates.
        clients: the N updates that were averaged.
        weights: N weights summing to 1.
        rotations: for every batch R (N, G, r, r), or None.
        angles: key of A → N degrees.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    reports = {}
    for g, batch in enumerate(layout.batches):
        R = None if rotations is None else rotations[g]
        for i, a in enumerate(batch.adapters):
            A, B = _factors(a, clients)
            if R is not None:
                Ri = R[:, i].to(A.dtype)
                A, B = Ri.mT @ A, B @ Ri
            error, norm = aggregation_error(A, B, w.to(A.device))
            reports[a.key_A] = AdapterReport(a.module, a.rank, error, norm, tuple(angles[a.key_A]))
    return tuple(reports[a.key_A] for a in layout.adapters)


def _factors(a: Adapter, clients: Sequence[StateDict]) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    A = torch.stack([c[a.key_A].detach().reshape(a.rank, a.d_in) for c in clients])
    B = torch.stack([c[a.key_B].detach().reshape(a.d_out, a.rank) for c in clients])
    return A.to(dtype), B.to(dtype)


def _ratio(error: float, norm: float | None) -> float:
    return error / norm if norm else (math.inf if error else 0.0)


def _number(value: float | None, spec: str) -> str:
    return format(value, spec) if value is not None else f"{'–':>{spec.split('.')[0]}}"


def _short(module: str, width: int = 60) -> str:
    return module if len(module) <= width else "…" + module[1 - width :]
