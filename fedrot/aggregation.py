"""Aggregating the updates of one round, all at once or as they arrive."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from fedrot_kernels import Backend

from .adapters import Layout
from .alignment import Alignment, AlignOn, RotationGroup, check_range, check_rotations
from .averaging import RunningMean
from .diagnostics import rotation_angle
from .errors import UpdateError
from .methods import get_method
from .report import AdapterReport, Report, adapter_reports
from .round import Averages, average_round
from .updates import (
    Update,
    UpdateLike,
    check_update,
    check_weight,
    check_weights,
    not_finite,
    open_reference,
    open_update,
    open_updates,
)

OnInvalid = Literal["raise", "drop"]


@dataclass(frozen=True)
class AggregationResult:
    """The aggregated adapter.

    Attributes:
        state_dict: the keys, shapes and dtypes of the first update.
        report: aggregation error and rotation angles per adapter, clients used and dropped.
        config: the adapter_config.json of the reference's or else the first update's folder; None without folders.
    """

    state_dict: dict[str, Tensor] = field(repr=False)
    report: Report
    config: dict[str, Any] | None = None


def aggregate(
    updates: Sequence[UpdateLike],
    weights: Sequence[float] | None = None,
    reference: UpdateLike | None = None,
    *,
    method: str = "fedrot",
    align_on: AlignOn = "alternate",
    round: int = 0,
    strength: float = 0.5,
    group: RotationGroup = "SO",
    on_invalid: OnInvalid = "raise",
    backend: Backend = "auto",
    report_error: bool = True,
) -> AggregationResult:
    """Merge the LoRA adapters of several clients into one.

    Ā = Σ wᵢ RᵢᵀAᵢ and B̄ = Σ wᵢ BᵢRᵢ with rotations Rᵢ towards the reference (FedRot-LoRA, arXiv 2602.23638), or Rᵢ = I
    (FedIT); every other tensor is averaged. Deterministic: the same inputs give the same bits.

    Variants of LoRA that a rotation would break are refused as far as keys, shapes and a folder's configuration show
    them. A bare state dict does not tell block-diagonal factors, nor ``target_parameters`` of a module that is not
    called "experts": pass those as folders.

    Args:
        updates: for every client a PEFT state dict (as from ``peft.get_peft_model_state_dict`` or with the adapter's name
            in the keys) or a PEFT folder. float16, bfloat16, float32 or float64; all clients alike.
        weights: a non-negative number per update, such as its example count; None for equal weights.
        reference: the global adapter that the clients started from, in either form. None takes the update of the largest
            weight (the first of several), for clients without a common start.
        method: a name in ``fedrot.METHODS``.
        align_on: the factor to align: "A", "B", "alternate" (odd rounds A, even rounds B) or "joint".
        round: the round's number, from 0; matters to "alternate" only.
        strength: λ; 0 is FedIT, bit for bit, 1 the full Procrustes rotation.
        group: "SO" (rotations) or "O" (reflections too).
        on_invalid: "raise" on NaN or Inf in an update, or "drop" that client and report it.
        backend: "triton", "torch", or "auto": Triton for tensors on a GPU, as far as it takes their dtype and rank.
        report_error: False leaves the aggregation error out of the report, which then costs next to nothing.

    Returns:
        The merged adapter with a report.

    Raises:
        UpdateError: updates that cannot be averaged, by client, key and shapes.
        ValueError: an unknown method or option.
    """
    aggregator = FedRotAggregator(
        reference,
        method=method,
        align_on=align_on,
        round=round,
        strength=strength,
        group=group,
        on_invalid=on_invalid,
        backend=backend,
        report_error=report_error,
    )
    return aggregator.aggregate(updates, weights)


class FedRotAggregator:
    """A server's aggregation over rounds. It keeps the reference (its own last result) and the round.

    Either ``aggregate`` a round's updates at once, or ``add`` them as they arrive and ``finish``: then memory does not
    grow with the number of clients, and the report has no aggregation error.

    Args:
        reference: the adapter that the clients start from; None if they have none in common yet, in which case the first
            round must be aggregated at once.
        method, align_on, round, strength, group, on_invalid, backend, report_error: as in ``aggregate``; the last two are
            for rounds aggregated at once.

    Attributes:
        reference: the adapter that the clients of the next round start from.
        round: the number of the next round.
    """

    def __init__(
        self,
        reference: UpdateLike | None = None,
        *,
        method: str = "fedrot",
        align_on: AlignOn = "alternate",
        round: int = 0,
        strength: float = 0.5,
        group: RotationGroup = "SO",
        on_invalid: OnInvalid = "raise",
        backend: Backend = "auto",
        report_error: bool = True,
    ):
        self.method = get_method(method, Alignment(align_on, strength, group))
        for name, value, allowed in (("on_invalid", on_invalid, OnInvalid), ("backend", backend, Backend)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")
        if not hasattr(round, "__index__") or isinstance(round, bool) or round < 0:
            raise ValueError(f"round must be a whole number from 0, got {round!r}")
        self.reference = reference
        self.round = int(round)
        self.on_invalid = on_invalid
        self.backend = backend
        self.report_error = report_error
        self._config: dict[str, Any] | None = None
        self._under_way: _Round | None = None

    def aggregate(self, updates: Sequence[UpdateLike], weights: Sequence[float] | None = None) -> AggregationResult:
        """Aggregate a whole round. See ``fedrot.aggregate``."""
        if self._under_way is not None:
            raise RuntimeError("updates were added one by one; finish() that round first")
        clients, layout = open_updates(updates)
        values = check_weights(weights, clients)
        first, dropped = clients[0], dict[str, str]()
        given = None if self.reference is None else open_reference(self.reference, first, layout)
        averages, target = self._average(layout, clients, values, given)
        if not averages.sound:  # only then look for what is wrong
            kept = [(client, w) for client, w in zip(clients, values, strict=True) if self._is_valid(client, dropped)]
            if not any(w for _, w in kept):
                raise _nothing_left(dropped)
            if dropped:
                clients, values = map(list, zip(*kept, strict=True))
                averages, target = self._average(layout, clients, values, given)
            if averages.residual is not None:
                check_rotations(averages.residual, layout.adapters, [client.name for client in clients])
        names, shares = tuple(client.name for client in clients), _shares(values)
        adapters = adapter_reports(layout, averages, shares, self.report_error)
        report = Report(self.method.name, self.round, names, shares, dropped, adapters)
        return self._close(first, target, averages.mean, report, check=not averages.sound)

    def _average(
        self, layout: Layout, clients: list[Update], weights: list[float], reference: Update | None
    ) -> tuple[Averages, Update]:
        """The averages, and the reference: the one given, or the client of the largest weight."""
        if reference is None:
            reference = clients[max(range(len(clients)), key=weights.__getitem__)]
        on = self.method.aligned_on(self.round)
        averages = average_round(layout, clients, weights, reference, on, self.method.alignment, self.backend)
        return averages, reference

    def add(self, update: UpdateLike, weight: float = 1.0) -> None:
        """Add one client's update to the round; nothing of it is kept but its share of the sums.

        Raises:
            UpdateError: as in ``aggregate``; the round goes on as if the update had not been added.
        """
        round = self._under_way
        client = open_update(update, f"client {round.seen if round else 0}")
        weight = check_weight(weight, client)
        if round is None:
            layout = Layout(client.specs, client.name)
            if self.reference is None and self.method.aligned_on(self.round):
                raise UpdateError(
                    "updates that are added one by one need a reference; pass the adapter that the clients started from, "
                    "or aggregate(updates) the first round at once"
                )
            target = None if self.reference is None else open_reference(self.reference, client, layout)
            round = _Round(client, layout, target, {})
        check_update(client, round.first, round.layout)
        if self._is_valid(client, round.dropped):
            rotations = None
            if on := self.method.aligned_on(self.round):
                alignment, target = self.method.alignment, round.reference
                assert target is not None
                rotations = [alignment.rotations(batch, client, target, on) for batch in round.layout.batches]
            round.add(client, weight, rotations)
        self._under_way = round

    def finish(self) -> AggregationResult:
        """The aggregate of the updates added since the last round.

        Raises:
            UpdateError: none was added, or none of positive weight is left; the next ``add`` begins the round anew.
        """
        round, self._under_way = self._under_way, None
        if round is None:
            raise UpdateError("no updates: add at least one before finish()")
        if not any(round.weights):
            raise _nothing_left(round.dropped)
        adapters = tuple(
            AdapterReport(a.module, a.rank, None, None, tuple(round.angles[a.key_A])) for a in round.layout.adapters
        )
        shares = _shares(round.weights)
        report = Report(self.method.name, self.round, tuple(round.clients), shares, round.dropped, adapters)
        return self._close(round.first, round.reference, round.mean.state_dict(), report, check=True)

    def _is_valid(self, client: Update, dropped: dict[str, str]) -> bool:
        found = not_finite(client)
        if found and self.on_invalid == "raise":
            raise UpdateError(f'{client.name}, {found}; leave this client out, or drop such clients (on_invalid="drop")')
        if found:
            dropped[client.name] = found
        return not found

    def _close(
        self, first: Update, reference: Update | None, mean: dict[str, Tensor], report: Report, *, check: bool
    ) -> AggregationResult:
        state_dict = {given: mean[key] for key, given in first.keys_given.items()}
        if check:
            check_range(state_dict, "the average,")
        self._config = (reference.config if reference is not None else None) or self._config or first.config
        self.reference, self.round = state_dict, self.round + 1
        return AggregationResult(state_dict, report, self._config)


class _Round:
    """What is kept of a round's updates while they are added one by one."""

    def __init__(self, first: Update, layout: Layout, reference: Update | None, dropped: dict[str, str]):
        self.first, self.layout, self.reference, self.dropped = first.without_tensors(), layout, reference, dropped
        self.clients: list[str] = []
        self.weights: list[float] = []
        self.angles: dict[str, list[float]] = {a.key_A: [] for a in layout.adapters}
        self.mean = RunningMean(layout, first.device)

    @property
    def seen(self) -> int:
        return len(self.clients) + len(self.dropped)

    def add(self, client: Update, weight: float, rotations: list[Tensor] | None) -> None:
        self.mean.add(client, weight, rotations)
        self.clients.append(client.name)
        self.weights.append(weight)
        for g, batch in enumerate(self.layout.batches):
            angles = rotation_angle(rotations[g]).tolist() if rotations else [0.0] * len(batch.adapters)
            for a, angle in zip(batch.adapters, angles, strict=True):
                self.angles[a.key_A].append(angle)


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    largest = max(weights)
    relative = [w / largest for w in weights]  # whose sum cannot overflow
    total = sum(relative)
    return tuple(w / total for w in relative)


def _nothing_left(dropped: dict[str, str]) -> UpdateError:
    reasons = "".join(f"; dropped {client}: {why}" for client, why in dropped.items())
    return UpdateError(f"nothing to average: no client of positive weight is left{reasons}")
