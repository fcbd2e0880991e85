"""A server's aggregation over rounds, of all updates at once or as they arrive."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from fedrot_kernels import Backend

from .adapters import Layout
from .alignment import Alignment, AlignOn, RotationGroup, check_range, check_rotations
from .averaging import shares_of
from .errors import UpdateError
from .folding import base_config
from .frozen import as_sent, check_frozen
from .methods import Round, get_method
from .report import Report, adapter_reports
from .result import AggregationResult
from .round import Averages
from .scaling import Scalings, scalings, widest_layout, with_configs
from .server_optimizer import ServerOptimizer
from .stream import Stream
from .updates import (
    Update,
    UpdateLike,
    check_device,
    check_update,
    check_updates,
    check_weight,
    check_weights,
    not_finite,
    open_reference,
    open_update,
    open_updates,
)

OnInvalid = Literal["raise", "drop"]


class FedRotAggregator:
    """A server's aggregation over rounds. It keeps the reference (its own last result) and the round.

    Either ``aggregate`` a round's updates at once, or ``add`` them as they arrive and ``finish``: then memory does not
    grow with the number of clients, and the report has no aggregation error.

    Args:
        reference: the adapter that the clients start from; None if they have none in common yet, in which case the first
            round must be aggregated at once.
        method, align_on, round, strength, group, on_invalid, backend, report_error, configs, seed: as in ``aggregate``;
            backend, report_error and configs are for rounds aggregated at once.
        server_optimizer: steps from the reference towards each round's mean; None takes the mean itself, as does a first
            round without a reference.

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
        configs: Any = None,
        seed: int = 0,
        server_optimizer: ServerOptimizer | None = None,
    ):
        self.method = get_method(method, Alignment(align_on, strength, group), seed)
        if server_optimizer is not None and not self.method.keeps_basis:
            raise ValueError(
                f"{method}'s result is no mean in the basis of the last one, towards which a server optimizer could step; "
                "leave it out, or take another method"
            )
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
        self.configs = configs
        self.server_optimizer = server_optimizer
        self._config: dict[str, Any] | None = None
        self._under_way: Stream | None = None

    def aggregate(
        self,
        updates: Sequence[UpdateLike],
        weights: Sequence[float] | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> AggregationResult:
        """Aggregate a whole round. See ``fedrot.aggregate``; names are what errors and the report call the clients."""
        if self._under_way is not None:
            raise RuntimeError("updates were added one by one; finish() that round first")
        clients = with_configs(open_updates(updates, names), self.configs)
        numbers = {client.name: number for number, client in enumerate(clients)}
        layout = self._layout(clients)
        values = check_weights(weights, clients)
        dropped = dict[str, str]()
        if self.method.needs_all:  # whose algebra does not survive NaN
            clients, values = self._valid(clients, values, dropped)
            layout = self._layout(clients) if dropped else layout
        given = None if self.reference is None else self._open_reference(clients[0], layout)
        averages = self._average(layout, clients, numbers, values, given)
        if not averages.sound:  # only then look for what is wrong
            kept, kept_values = self._valid(clients, values, dropped)
            if len(kept) < len(clients):
                clients, values = kept, kept_values
                averages = self._average(layout, clients, numbers, values, given)
            if averages.residual is not None:
                check_rotations(averages.residual, layout.adapters, [client.name for client in clients])
        frozen = self._frozen(layout)
        for client in clients:
            check_frozen(client, given or clients[0], frozen, self.method.name)
        used, shares = tuple(client.name for client in clients), shares_of(values)
        adapters = adapter_reports(layout, averages, shares, self.report_error)
        report = Report(self.method.name, self.round, used, shares, dropped, adapters)
        return self._close(clients, layout, given, averages, report, check=not averages.sound)

    def _layout(self, clients: list[Update]) -> Layout:
        if not self.method.unequal_ranks:
            layout = check_updates(clients)
        else:
            for client in clients[1:]:
                check_device(client, clients[0])
            layout = widest_layout(clients)
        self.method.check(layout)
        return layout

    def _scalings(self, clients: Sequence[Update], layout: Layout) -> Scalings | None:
        return scalings(clients, layout) if self.method.unequal_ranks else None

    def _open_reference(self, first: Update, layout: Layout) -> Update:
        assert self.reference is not None
        if self.method.unequal_ranks or self.method.returns() != ("A", "B"):  # the reference may have other shapes, or no B
            return open_update(self.reference, "the reference")
        return open_reference(self.reference, first, layout)

    def _valid(
        self, clients: list[Update], weights: list[float], dropped: dict[str, str]
    ) -> tuple[list[Update], list[float]]:
        kept = [(client, w) for client, w in zip(clients, weights, strict=True) if self._is_valid(client, dropped)]
        if not any(w for _, w in kept):
            raise _nothing_left(dropped)
        return [client for client, _ in kept], [w for _, w in kept]

    def _average(
        self,
        layout: Layout,
        clients: list[Update],
        numbers: dict[str, int],
        weights: list[float],
        reference: Update | None,
    ) -> Averages:
        """The averages, towards the reference given, or else the client of the largest weight."""
        if reference is None:
            reference = clients[max(range(len(clients)), key=weights.__getitem__)]
        round = Round(
            self.round,
            layout,
            clients,
            [numbers[client.name] for client in clients],
            weights,
            reference,
            self._scalings(clients, layout),
            self.backend,
            self.report_error,
        )
        return self.method.aggregate(round)

    def _frozen(self, layout: Layout) -> frozenset[str]:
        """The keys of factors that no client trained in this round."""
        trained = self.method.trains(self.round)
        return frozenset(key for keys in layout.factor_keys for key, f in zip(keys, "AB", strict=True) if f not in trained)

    def add(self, update: UpdateLike, weight: float = 1.0) -> None:
        """Add one client's update to the round; nothing of it is kept but its share of the sums.

        Raises:
            UpdateError: as in ``aggregate``; the round goes on as if the update had not been added.
        """
        if self.method.needs_all:
            raise ValueError(f"{self.method.name} needs all updates of a round at once: aggregate(updates)")
        round = self._under_way
        client = open_update(update, f"client {round.seen if round else 0}")
        if self.configs is not None:
            client = with_configs([client], self.configs)[0]
        weight = check_weight(weight, client)
        if round is None:
            layout = Layout(client.specs, client.name)
            self.method.check(layout)
            if self.reference is None and self.method.needs_reference(self.round):
                raise UpdateError(
                    "updates that are added one by one need a reference; pass the adapter that the clients started from, "
                    "or aggregate(updates) the first round at once"
                )
            target = None if self.reference is None else self._open_reference(client, layout)
            round = Stream(client, layout, target)
        check_update(client, round.first, round.layout)
        if self._is_valid(client, round.dropped):
            if not round.clients:  # what others must not have trained either
                start = round.reference or client
                round.frozen = {k: as_sent(start[k], round.layout.specs[k]) for k in self._frozen(round.layout)}
            check_frozen(client, round.frozen, round.frozen, self.method.name)
            round.add(client, weight, *self.method.prepare(self.round, client, round.seen, round.layout, round.reference))
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
        clients, shares = tuple(round.clients), shares_of(round.weights)
        report = Report(self.method.name, self.round, clients, shares, round.dropped, round.adapter_reports())
        averages = Averages(round.mean.state_dict() | round.frozen, [], [], None, None, False)
        return self._close([round.first], round.layout, round.reference, averages, report, check=True)

    def _is_valid(self, client: Update, dropped: dict[str, str]) -> bool:
        found = not_finite(client)
        if found and self.on_invalid == "raise":
            raise UpdateError(f'{client.name}, {found}; leave this client out, or drop such clients (on_invalid="drop")')
        if found:
            dropped[client.name] = found
        return not found

    def _close(
        self,
        clients: Sequence[Update],
        layout: Layout,
        reference: Update | None,
        averages: Averages,
        report: Report,
        *,
        check: bool,
    ) -> AggregationResult:
        personal = {
            key for keys in layout.factor_keys for key, f in zip(keys, "AB", strict=True) if f not in self.method.returns()
        }
        frozen = self._frozen(layout)
        mean = {key: x for key, x in averages.mean.items() if key not in personal}
        if frozen and clients[0].tensors:  # to the bit, not to the rounding of a mean of equals
            mean |= {key: as_sent((reference or clients[0])[key], layout.specs[key]) for key in frozen}
        if averages.base is not None:  # what PEFT saves of a base would undo its change
            folded = {f"{a.module}.base_layer.weight" for a in layout.adapters}
            mean = {key: x for key, x in mean.items() if key not in folded}
        if self.server_optimizer is not None and reference is not None:
            mean = self.server_optimizer.step(reference, mean, layout.specs, frozen)
        first = clients[0]
        state_dict = {given: mean[key] for key, given in first.keys_given.items() if key in mean}
        if check or self.server_optimizer is not None:
            check_range(state_dict | (averages.base or {}), "the average,")
        s = self._scalings(clients, layout)
        chosen = s.config if s else first.config
        self._config = (reference.config if reference is not None else None) or self._config or chosen
        self.reference, self.round = state_dict, self.round + 1
        config = chosen if self.method.unequal_ranks else self._config
        return AggregationResult(
            state_dict,
            report,
            config,
            averages.base,
            None if averages.base is None else base_config(averages.base, config or {}),
            tuple(first.keys_given[key] for key in layout.specs if key in personal),
        )


def _nothing_left(dropped: dict[str, str]) -> UpdateError:
    reasons = "".join(f"; dropped {client}: {why}" for client, why in dropped.items())
    return UpdateError(f"nothing to average: no client of positive weight is left{reasons}")
