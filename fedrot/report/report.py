"""What an aggregation did, adapter by adapter and client by client."""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..robust.choice import Choice

_EXPERT = re.compile(r"\[\d+\]$")
_WORSE = 1.1  # times the plain average's error, from which on rotating did harm
_ROUNDING = 1e-6  # of the update: errors below it are those of float32
_CURE = 'take method="fedrot-adaptive", which rotates only as far as it helps, or align_on="A"'


@dataclass(frozen=True)
class AdapterReport:
    """The report of one adapter.

    Attributes:
        module: the adapted module; of an expert, the parameter and the expert's number, as in experts.down_proj[3].
        rank: r.
        error: the aggregation error ‖Σ wᵢBᵢAᵢ − B̄Ā‖_F after rotation, without the scaling s; None without ``report_error``.
        update_norm: ‖Σ wᵢBᵢAᵢ‖_F, without the scaling s; None without ``report_error``.
        angles: the rotation angle of each client used, in degrees.
        strength: the λ that the method chose, as fedrot-adaptive does; None for other methods.
        undetermined: in how many directions nothing determined the rotation, over all clients; there R is completed by what
            is nearest the identity. None for methods that do not count them.
        directions: the number of directions in all, which is the sum of the clients' ranks; None likewise.
        plain_error: what the plain average of the same updates would lose, measured or estimated as ``error`` is; None
            without ``report_error``, and for methods whose result is no average of factors.
        deviations: the standard deviations of ``error`` and ``update_norm`` where they are estimated; None where they are
            exact.
    """

    module: str
    rank: int
    error: float | None
    update_norm: float | None
    angles: tuple[float, ...]
    strength: float | None = None
    deviations: tuple[float, float] | None = None
    undetermined: int | None = None
    directions: int | None = None
    plain_error: float | None = None

    @property
    def relative_error(self) -> float | None:
        """error / update_norm; 0 where both are 0."""
        return None if self.error is None else _ratio(self.error, self.update_norm)


@dataclass(frozen=True)
class Report:
    """The report of an aggregation. Printed, it is a table: rounds count from 1, experts share a line.

    Attributes:
        method: the method's name in the registry.
        round: the round's index, from 0; None for a merge of adapters that were trained independently.
        clients: the clients that were averaged.
        weights: their weights, summing to 1.
        dropped: client → the reason why it was left out.
        adapters: one report per adapter.
        target: what clients were rotated towards, in words; None if they were not, as towards an untrained reference.
        deviation: the standard deviation of ``error`` where it is estimated; None where it is exact.
        choice: which clients were refused or clipped by ``robust`` and ``clip``; None without them. ``clients`` and
            ``weights`` are of those that count, without the reference that clipping may add.
    """

    method: str
    round: int | None
    clients: tuple[str, ...]
    weights: tuple[float, ...]
    dropped: dict[str, str]
    adapters: tuple[AdapterReport, ...]
    target: str | None
    deviation: float | None = None
    choice: Choice | None = None

    @property
    def error(self) -> float | None:
        """The aggregation error of the whole model: the root of the sum of squares over adapters."""
        return _total(a.error for a in self.adapters)

    @property
    def relative_error(self) -> float | None:
        """The whole model's aggregation error over the whole model's update norm, both without scalings.

        Where modules differ in s, the loss of the model's own update is another number, which ``merge`` reports.
        """
        return None if self.error is None else _ratio(self.error, self._update_norm)

    @property
    def plain_relative_error(self) -> float | None:
        """``plain_error`` over the whole model's update norm; None where it is unknown."""
        return None if self.plain_error is None else _ratio(self.plain_error, self._update_norm)

    @property
    def _update_norm(self) -> float:
        return math.hypot(*(a.update_norm or 0 for a in self.adapters))

    @property
    def plain_error(self) -> float | None:
        """What the plain average of the same updates would lose, over the whole model; None where it is unknown."""
        return _total(a.plain_error for a in self.adapters)

    @property
    def rotating_hurt(self) -> bool:
        """Whether the result loses more than 1.1 times what the plain average would."""
        error, plain = self.error, self.plain_error
        if self.target is None or error is None or plain is None:
            return False
        return error > _WORSE * plain and error > _ROUNDING * self._update_norm

    @property
    def undetermined(self) -> int:
        """The number of directions, over all adapters and clients, in which nothing determined the rotation."""
        return sum(a.undetermined or 0 for a in self.adapters)

    @property
    def angle(self) -> float:
        """The mean rotation angle over adapters and clients, in degrees."""
        angles = [angle for a in self.adapters for angle in a.angles]
        return sum(angles) / len(angles)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain Python data for JSON, with None for infinities, which JSON lacks."""
        values = asdict(self) | {"error": self.error, "relative_error": self.relative_error, "angle": self.angle}
        values |= {"undetermined": self.undetermined, "plain_error": self.plain_error}
        values["plain_relative_error"] = self.plain_relative_error
        plain: dict[str, Any] = _without_infinities(values)
        return plain

    def __str__(self) -> str:
        """The report as a table."""
        lines = [f"{'adapter':<60} {'rank':>4} {'error':>10} {'relative':>9} {'mean angle':>11} {'max angle':>10}"]
        for module, adapters in _group_experts(self.adapters):
            error, norm = _total(a.error for a in adapters), _total(a.update_norm for a in adapters)
            angles = [angle for a in adapters for angle in a.angles]
            relative = None if error is None else _ratio(error, norm)
            lines.append(
                f"{_short(module):<60} {adapters[0].rank:>4} {_number(error, '10.3e')} {_number(relative, '9.4f')} "
                f"{sum(angles) / len(angles):>10.1f}° {max(angles):>9.1f}°"
            )
        lines.append(
            f"{_count(len(self.adapters), 'adapter', 'all '):<60} {'':>4} {_number(self.error, '10.3e')} "
            f"{_number(self.relative_error, '9.4f')} {self.angle:>10.1f}°"
        )
        if self.round is None:
            lines.append(f"{self.method}, {_count(len(self.clients), 'adapter')} merged")
        else:
            lines.append(f"{self.method}, round {self.round + 1}, {_count(len(self.clients), 'client')} averaged")
        if strengths := [a.strength for a in self.adapters if a.strength is not None]:
            mean = sum(strengths) / len(strengths)
            lines.append(f"strengths chosen: {min(strengths):g} to {max(strengths):g}, {mean:.2f} on average")
        if self.deviation is not None:
            lines.append(f"errors are estimated: {_number(self.error, '.3e')} ± {self.deviation:.1e} for all adapters")
        lines += [f"dropped {client}: {why}" for client, why in self.dropped.items()]
        lines += [] if self.choice is None else self.choice.lines()
        if self.target is None:
            why = ": the reference, or every client, is untrained" if is_unrotated(self.adapters) else ""
            lines.append(f"nothing was rotated{why}")
        else:
            lines.append(f"rotated towards {self.target}")
        if self.target is not None and self.plain_error is not None:
            lines.append(f"plain averaging would lose {self.plain_error:.3e} ({self.plain_relative_error:.4f})")
        if self.rotating_hurt:
            lines.append(f"rotating lost more than that: {_CURE}")
        if self.target is not None and self.undetermined:
            every = sum(a.directions or 0 for a in self.adapters)
            lines.append(f"undetermined, so as near to unrotated as can be: {self.undetermined} of {every} directions")
        return "\n".join(lines)


def without_plain_errors(adapters: Iterable[AdapterReport]) -> tuple[AdapterReport, ...]:
    """The reports of adapters whose clients were not averaged as they came, nor rotated."""
    return tuple(replace(a, plain_error=None) for a in adapters)


def is_unrotated(adapters: Iterable[AdapterReport]) -> bool:
    """Whether nothing determined the rotation of any adapter in any direction: its references or its clients are zero."""
    return all(a.undetermined is not None and a.undetermined == a.directions for a in adapters)


def _group_experts(adapters: Iterable[AdapterReport]) -> list[tuple[str, list[AdapterReport]]]:
    """The adapters by what a line of the table shows: one adapter, or those of all experts of one parameter."""
    groups: dict[str, list[AdapterReport]] = {}
    for a in adapters:
        groups.setdefault(_EXPERT.sub("", a.module), []).append(a)
    return [(name if len(of) == 1 else f"{name} × {len(of)}", of) for name, of in groups.items()]


def _total(values: Iterable[float | None]) -> float | None:
    """The root of the sum of squares; None if a value is unknown."""
    listed = list(values)
    known = [x for x in listed if x is not None]
    return math.hypot(*known) if len(known) == len(listed) else None


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ratio(error: float, norm: float | None) -> float:
    return error / norm if norm else (math.inf if error else 0.0)


def _number(value: float | None, spec: str) -> str:
    return format(value, spec) if value is not None else f"{'–':>{spec.split('.')[0]}}"


def _count(n: int, what: str, every: str = "") -> str:
    """A number of things in words, such as "1 client" and "all 3 adapters"."""
    return f"1 {what}" if n == 1 else f"{every}{n} {what}s"


def _short(module: str, width: int = 60) -> str:
    return module if len(module) <= width else "…" + module[1 - width :]
