"""A server's aggregation over rounds, of all updates at once or as they arrive."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

from torch import Tensor

from fedrot_kernels import Backend

from ..adapters.checks import as_sent, check_frozen, check_range, check_weight, check_weights
from ..adapters.config import base_config
from ..adapters.layout import Layout
from ..adapters.update import Update, UpdateLike, open_update, open_updates, with_configs
from ..errors import UpdateError
from ..methods.registry import get_method
from ..methods.rotation import check_rotations
from ..methods.round import Averages, Round
from ..methods.running_mean import shares_of
from ..options import Alignment, AlignOn, RotationGroup, Strength
from ..ranks.padding import padded, trainable, widest
from ..report.measure import adapter_reports
from ..report.report import Report
from ..report.result import AggregationResult
from .optimizer import ServerOptimizer
from .partial import Partial, check_mergeable
from .rounding import rounded
from .stream import Stream, is_name
from .validation import Intake, OnInvalid, nothing_left

Towards = Literal["global", "consensus"]


class FedRotAggregator:
    """A server's aggregation over rounds. It keeps the reference (its own last result) and the round.

    Either ``aggregate`` a round's updates at once, or ``add`` them as they arrive and ``finish``: then memory does not
    grow with the number of clients but for their names, weights and angles, and the report estimates the aggregation error.
    Servers that share a round's clients each ``add`` theirs; one of them ``merge``s what the others have so far
    (``partial``), in any tree.

    Args:
        reference: the adapter that the clients start from; None if they have none in common yet, in which case the first
            round must be aggregated at once. "consensus" rotates clients towards each other, see ``aggregate``.
        previous: with the reference "consensus", the adapter that the clients of the first round start from, if any.
        method, align_on, round, strength, group, on_invalid, backend, report_error, configs, seed: as in ``aggregate``;
            backend is for rounds aggregated at once. In a stream, seed also draws the sketch that estimates the error.
        server_optimizer: steps from the reference towards each round's mean; None takes the mean itself, as does a first
            round without a reference.

    Attributes:
        reference: the adapter that the clients of the next round start from.
        round: the number of the next round.
        strengths: module → λ of the last round with ``strength="auto"``, which the next prefers; set it after a restart.
    """

    def __init__(
        self,
        reference: UpdateLike | Literal["consensus"] | None = None,
        *,
        previous: UpdateLike | None = None,
        method: str = "fedrot",
        align_on: AlignOn = "alternate",
        round: int = 0,
        strength: Strength | None = None,
        group: RotationGroup = "SO",
        on_invalid: OnInvalid = "raise",
        backend: Backend = "auto",
        report_error: bool = True,
        configs: Any = None,
        seed: int = 0,
        server_optimizer: ServerOptimizer | None = None,
    ):
        consensus = isinstance(reference, str) and reference == "consensus"
        if previous is not None and not consensus:
            raise ValueError('previous goes with reference="consensus"; otherwise that adapter is the reference')
        for name, value in (("round", round), ("seed", seed)):
            if not hasattr(value, "__index__") or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a whole number from 0, got {value!r}")
        self.method = get_method(method, Alignment(align_on, strength, group, consensus), int(seed))
        if server_optimizer is not None and not self.method.keeps_basis:
            raise ValueError(
                f"{method}'s result is no mean in the basis of the last one, towards which a server optimizer could step; "
                "leave it out, or take another method"
            )
        if backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
        self.reference = previous if consensus else reference
        self.round = int(round)
        self.strengths: dict[str, float] = {}
        self.backend = backend
        self.report_error = report_error
        self.configs = configs
        self.server_optimizer = server_optimizer
        self._intake = Intake(self.method, on_invalid)
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
        given, layout = self._start(clients)
        values = check_weights(weights, clients)
        dropped = dict[str, str]()
        if self._intake.must_be_sound(clients, layout, given):
            clients, values = self._intake.valid(clients, values, dropped)
            if dropped:
                given, layout = self._start(clients)
        averages = self._average(layout, clients, numbers, values, given)
        if not averages.sound:  # only then look for what is wrong
            kept, kept_values = self._intake.valid(clients, values, dropped)
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

    def _start(self, clients: Sequence[Update]) -> tuple[Update | None, Layout]:
        """What the clients started from, if that is known, and their layout in its ranks."""
        return self._intake.start(self.reference, self._config, clients)

    def _average(
        self,
        layout: Layout,
        clients: list[Update],
        numbers: dict[str, int],
        weights: list[float],
        reference: Update | None,
    ) -> Averages:
        """The averages, towards the reference given, or else the client of the largest weight, among the widest."""
        s = self._intake.scalings(clients, layout, reference)
        clients = self._intake.padded(clients, layout, s)
        given = reference
        if reference is None:
            reference = widest(clients, weights, layout)
        round = Round(
            self.round,
            layout,
            clients,
            [numbers[client.name] for client in clients],
            weights,
            reference,
            s,
            self.strengths,
            self.backend,
            self.report_error,
        )
        averages = self.method.aggregate(round)
        is_padded = self.method.pads and (s is not None or any(client.ranks is not None for client in clients))
        return rounded(averages, layout, clients, given) if is_padded else averages

    def _frozen(self, layout: Layout) -> frozenset[str]:
        """The keys of factors that no client trained in this round."""
        trained = self.method.trains(self.round)
        return frozenset(key for keys in layout.factor_keys for key, f in zip(keys, "AB", strict=True) if f not in trained)

    def add(self, update: UpdateLike, weight: float = 1.0, name: str | None = None) -> None:
        """Add one client's update to the round; nothing of it is kept but its share of the sums.

        Args:
            update: as in ``aggregate``.
            weight: non-negative, such as its example count.
            name: what errors and the report call the client, unlike any other of the round; None for client 0, client 1, …

        Raises:
            UpdateError: as in ``aggregate``; the round goes on as if the update had not been added.
        """
        self._check_streams()
        if name is not None and not is_name(name):
            raise ValueError(f"name must be a line of text, got {name!r}")
        round = self._under_way
        client = open_update(update, name or f"client {round.seen if round else 0}", round.first if round else None)
        if round is not None and (client.name in round.weights or client.name in round.dropped):
            raise UpdateError(f"{client.name} is in this round already; give every client a name of its own")
        if self.configs is not None:
            client = with_configs([client], self.configs)[0]
        weight = check_weight(weight, client)
        if round is None:
            round = self._begin(client)
        self._intake.check_next(client, round.first, round.layout, round.reference)
        if self._intake.is_valid(client, round.dropped):
            if not round.weights:
                round.frozen = self._untrained(round, client)
            check_frozen(client, round.frozen, round.frozen, self.method.name)
            pair = [round.first, client]
            if self.method.pads and (s := self._intake.scalings(pair, round.layout, round.reference)):
                client = padded(client, round.layout, s.of_clients[1], s.of_result)
            prepared = self.method.prepare(self.round, client, round.seen, round.layout, round.reference)
            round.add(client.name, weight, *prepared)
        self._under_way = round

    def partial(self, name: str | None = None) -> Partial:
        """Take the updates added so far out of the round, for another server's ``merge`` and through it for its next.

        This aggregator's reference and round stay: set both when the round's result is there, and its server optimizer
        plays no part.

        Args:
            name: put before the names of its clients, "north/client 0", so that those of several servers differ.

        Raises:
            UpdateError: none was added.
        """
        self._check_merges()
        if name is not None and not is_name(name):
            raise ValueError(f"name must be a line of text, got {name!r}")
        round, self._under_way = self._under_way, None
        if round is None:
            raise UpdateError("no updates: add at least one before partial()")
        return Partial.of(round, self._alike(round), name)

    def merge(self, partial: Partial | str | os.PathLike) -> None:
        """Add the clients that another server has added: to rounding the same as adding them here, whatever the tree.

        The same merges in the same order give the same bits. If either side does not measure errors, none is reported.

        Args:
            partial: what its ``partial()`` returned, or the file that was saved of it. It stays as it is.

        Raises:
            UpdateError: another round, method, reference or options; other keys, shapes or dtypes; a client that is here
                already; a damaged file. The round goes on as if nothing had been merged.
        """
        self._check_merges()
        if not isinstance(partial, Partial):
            partial = Partial.load(partial)
        theirs = partial.first
        round = self._under_way or self._begin(theirs)
        check_mergeable(partial, self._alike(round), round)
        if partial.stream.weights:
            expected = round.frozen if round.weights else self._untrained(round, theirs)
            check_frozen(theirs, expected, expected, self.method.name)
        round.merge(partial.stream)
        self._under_way = round

    def finish(self) -> AggregationResult:
        """The aggregate of the updates added since the last round.

        Raises:
            UpdateError: none was added, or none of positive weight is left; the next ``add`` begins the round anew.
        """
        round, self._under_way = self._under_way, None
        if round is None:
            raise UpdateError("no updates: add at least one before finish()")
        if not any(round.weights.values()):
            raise nothing_left(round.dropped)
        shares = shares_of(tuple(round.weights.values()))
        report = Report(self.method.name, self.round, tuple(round.weights), shares, round.dropped, *round.adapter_reports())
        mean = round.mean.state_dict() | round.frozen
        if self.method.pads and round.reference is not None:
            mean = trainable(mean, round.layout, round.reference)
        averages = Averages(mean, [], [], None, None, False)
        return self._close([round.first], round.layout, round.reference, averages, report, check=True)

    def _check_streams(self) -> None:
        if self.method.needs_all:
            a = self.method.alignment
            options = {"reference": "consensus" if a.consensus else None, "align_on": a.align_on, "strength": a.strength}
            chosen = [f"{k}={v!r}" for k, v in options.items() if v in ("consensus", "error", "auto")]
            what = f"{self.method.name} with {' and '.join(chosen)}" if chosen else self.method.name
            raise ValueError(f"{what} needs all updates of a round at once: aggregate(updates)")

    def _check_merges(self) -> None:
        self._check_streams()
        if not self.method.keeps_basis:
            raise ValueError(
                f"{self.method.name} draws for every client by its number in the round, which two servers would give twice: "
                "add all clients to one aggregator"
            )

    def _begin(self, first: Update) -> Stream:
        """A round of updates that are added one by one, of which this is the first."""
        if self.reference is None and self.method.needs_reference(self.round):
            raise UpdateError(
                "updates that are added one by one need a reference; pass the adapter that the clients started from, "
                "or aggregate(updates) the first round at once"
            )
        target, layout = self._start([first])
        return Stream(first, layout, target, self.method.seed if self.report_error else None)

    def _untrained(self, round: Stream, first: Update) -> dict[str, Tensor]:
        """The factors that no client of the round trains: what all must have started from."""
        start = round.reference or first
        return {key: as_sent(start[key], round.layout.specs[key]) for key in self._frozen(round.layout)}

    def _alike(self, round: Stream) -> dict[str, Any]:
        """What servers that merge their clients must have alike."""
        reference = round.reference_digest if self.method.needs_reference(self.round) else None
        options = {"method": self.method.name, "round": self.round, **asdict(self.method.alignment)}
        return options | {"seed": self.method.seed, "reference": reference}

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
        s = self._intake.scalings(clients, layout, reference)
        chosen = s.config if s else first.config
        self._config = (reference.config if reference is not None else None) or self._config or chosen
        self.reference, self.round = state_dict, self.round + 1
        self.strengths = {a.module: a.strength for a in report.adapters if a.strength is not None}
        config = chosen if self.method.unequal_ranks and not self.method.pads else self._config
        return AggregationResult(
            state_dict,
            report,
            config,
            averages.base,
            None if averages.base is None else base_config(averages.base, config or {}),
            tuple(first.keys_given[key] for key in layout.specs if key in personal),
        )


def towards(reference: Towards, adapter: UpdateLike | None) -> dict[str, Any]:
    """The options of ``FedRotAggregator`` for clients that start from an adapter: towards it, or each other."""
    if reference not in get_args(Towards):
        raise ValueError(f"reference must be one of {', '.join(get_args(Towards))}, got {reference!r}")
    return {"reference": "consensus", "previous": adapter} if reference == "consensus" else {"reference": adapter}
