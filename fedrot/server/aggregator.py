"""A server's aggregation over rounds, of all updates at once or as they arrive."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..adapters.update import UpdateLike, open_updates
from ..adapters.values import check_weight, check_weights
from ..errors import UpdateError
from ..methods.base import Method
from ..options import AggregationOptions, shows_options
from ..report.result import AggregationResult
from .optimizer import ServerOptimizer
from .partial import PartialAggregate, compatibility
from .state import ServerState
from .stream import StreamedRound
from .streamed_round import add_client, average_stream, begin_stream, check_streams, merge_clients, open_next
from .whole_round import average_whole


class FedRotAggregator(ServerState):
    """Aggregates round after round, and keeps what the next one needs: the reference, which is the last result.

    Either ``aggregate`` a round's updates at once, or ``add`` them as they arrive and ``finish``: then memory grows by
    names, weights and angles only, and a sketch that ``seed`` draws estimates the aggregation error. Servers that share a
    round each ``add`` their clients; one of them ``merge``s the others' ``partial`` sums, in any tree.

    Args:
        reference: the adapter that the clients start from: a PEFT state dict, a folder, or a pair of a state dict and its
            LoRA configuration. None if clients have no adapter in common yet; then aggregate the first round at once.
            Its tensors are not copied: do not train them further while a round is under way.
        round: the index of the next round, from 0.
        configs: the LoRA configuration of clients that send bare state dicts, as in ``aggregate``.
        server_optimizer: steps from the reference towards each round's mean; None takes the mean itself.
        **options: fields of ``AggregationOptions``.

    Raises:
        ValueError: a value that an option does not take, or a method that takes no server optimizer.
        TypeError: a keyword that is no option.
        UpdateError: a reference folder that cannot be read.
    """

    @shows_options()
    def __init__(
        self,
        reference: UpdateLike | None = None,
        *,
        round: int = 0,
        configs: Any = None,
        server_optimizer: ServerOptimizer | None = None,
        **options: Any,
    ):
        super().__init__(AggregationOptions.of(options), reference, round, server_optimizer)
        self.configs = configs
        self._streamed: StreamedRound | None = None

    def aggregate(
        self, updates: Sequence[UpdateLike], weights: Sequence[float] | None = None, *, names: Sequence[str] | None = None
    ) -> AggregationResult:
        """Aggregate a whole round; see ``fedrot.aggregate``.

        Args:
            updates: one per client.
            weights: one per client, or None for equal weights.
            names: one per client, for errors and the report; None for client 0, client 1, …
        """
        self._check_between_rounds()
        clients = open_updates(updates, names, self.configs)
        return self.close(average_whole(clients, check_weights(weights, clients), *self._start()))

    def add(self, update: UpdateLike, weight: float = 1.0, name: str | None = None) -> None:
        """Add one client's update to the round; nothing of it is kept but its share of the sums.

        Args:
            update: as in ``aggregate``.
            weight: non-negative, such as the client's example count.
            name: the client's name in errors and the report, unlike any other of the round; None for client 0, client 1, …

        Raises:
            UpdateError: as in ``aggregate``; the round goes on as if the update had not been added.
        """
        check_streams(self.method, name)
        client = open_next(self._streamed, update, name, self.configs)
        weight = check_weight(weight, client)
        streamed = self._streamed or begin_stream(client, *self._start())
        add_client(streamed, client, weight, self.method, self.round)
        self._streamed = streamed

    def partial(self, name: str | None = None) -> PartialAggregate:
        """Take the updates added so far out of the round, for another server's ``merge`` and through it for its next.

        Reference and round stay: set both when the round's result is there. The server optimizer plays no part.

        Args:
            name: put before the clients' names, as in "north/client 0", so that those of several servers differ.

        Raises:
            UpdateError: no update was added.
        """
        check_streams(self.method, name, merges=True)
        streamed = self._take("partial")
        return PartialAggregate.of(streamed, compatibility(self.method, self.round, streamed), name)

    def merge(self, partial: PartialAggregate | str | os.PathLike[str]) -> None:
        """Add the clients that another server has added: to rounding the same as adding them here, whatever the tree.

        The same merges in the same order give the same bits. If either side does not measure errors, none is reported.

        Args:
            partial: what the other's ``partial()`` returned, or the file that it was saved to. It stays as it is.

        Raises:
            UpdateError: another round, method, reference or options; other keys, shapes or dtypes; a client that is here
                already; a damaged file. The round goes on as if nothing had been merged.
        """
        check_streams(self.method, None, merges=True)
        self._streamed = merge_clients(self._streamed, partial, *self._start())

    def finish(self) -> AggregationResult:
        """Aggregate the updates added since the last round.

        Raises:
            UpdateError: none was added, or none of positive weight is left; the next ``add`` begins the round anew.
        """
        return self.close(average_stream(self._take("finish"), self.method, self.round))

    def state_dict(self) -> dict[str, Any]:
        """See ``ServerState.state_dict``; RuntimeError while a stream is not finished."""
        self._check_between_rounds()
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``ServerState.load_state_dict``; RuntimeError while a stream is not finished."""
        self._check_between_rounds()
        super().load_state_dict(state)

    def _check_between_rounds(self) -> None:
        if self._streamed is not None:
            raise RuntimeError("updates were added one by one; finish() that round first")

    def _start(self) -> tuple[Method, int, dict[str, Tensor] | None, dict[str, Any] | None]:
        return self.method, self.round, self._reference, self._config

    def _take(self, what: str) -> StreamedRound:
        streamed, self._streamed = self._streamed, None
        if streamed is None:
            raise UpdateError(f"no updates: add at least one before {what}()")
        return streamed
