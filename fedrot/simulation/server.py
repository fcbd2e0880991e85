"""The server of a simulation: the global adapter, the factors that clients keep, and the changes of the base weights."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..adapters.checks import check_updates
from ..adapters.keys import factor_of
from ..adapters.update import open_updates
from ..methods.registry import METHODS
from ..options import OPTION_NAMES
from ..report.fold import fold
from ..report.result import AggregationResult
from ..server.aggregator import FedRotAggregator
from ..server.optimizer import ServerOptimizer
from .clients import Clients, State
from .config import SimulationConfig
from .geometry import alignment_geometry
from .storage import round_to_float16


class Server:
    """Aggregates rounds, and gives every client the adapter that it starts from.

    Attributes:
        state: the global adapter by parameter name; None before the first round of clients with starts of their own.
        rounds_done: the number of rounds aggregated, which is the index of the coming round.
    """

    def __init__(self, clients: Clients, config: SimulationConfig):
        """Start before the first round.

        Args:
            clients: the clients, whose model the server evaluates with, and whose base weights some methods change.
            config: the run's configuration.
        """
        self.clients, self.config = clients, config
        self.state: State | None = clients.state() if config.start == "shared" else None
        self.rounds_done = 0
        self._initial = clients.state()
        self._personal: dict[int, State] = {}
        self._optimizer = None
        if config.server_optimizer != "none":
            self._optimizer = ServerOptimizer(config.server_optimizer, config.server_lr)
        self._folds = METHODS[config.method].updates_base
        self._aggregator = self._make_aggregator()

    def _make_aggregator(self) -> FedRotAggregator:
        return FedRotAggregator(
            self.state,
            round=self.rounds_done,
            configs=self.clients.lora,
            server_optimizer=self._optimizer,
            **{name: getattr(self.config, name) for name in OPTION_NAMES},
        )

    def check(self) -> None:
        """Raise UpdateError if the method cannot aggregate the clients' adapters, before anything is trained or written."""
        self._aggregator.method.check(check_updates(open_updates([self._initial])))

    def trained(self) -> list[str]:
        """Return the parameters that clients train in the coming round, by name."""
        factors = self._aggregator.method.trains(self.rounds_done)
        return [name for name in self._initial if factor_of(name) in (None, *factors)]

    def start_of(self, client: int) -> State:
        """Return a client's start: the global adapter, and the client's own factors where the method leaves it some."""
        if self.state is None:
            return self.clients.own_start(client)
        if len(self.state) == len(self._initial):
            return self.state
        own = self._personal.get(client)
        if own is None:
            own = self._initial if self.config.start == "shared" else self.clients.own_start(client)
        return {name: self.state[name] if name in self.state else own[name] for name in self._initial}

    def aggregate(self, chosen: Sequence[int], states: Sequence[State]) -> tuple[AggregationResult, dict[str, float]]:
        """Aggregate a round's trained adapters; the next round starts from the result.

        Args:
            chosen: the numbers of the clients that took part.
            states: their trained adapters, one each.

        Returns:
            The result, and the round's geometry if the configuration has it.

        Raises:
            UpdateError: a client's factors hold NaN or Inf (``on_invalid="raise"``).
        """
        equal = self.config.client_weights == "equal"
        weights = [1.0 if equal else float(len(self.clients.examples[c])) for c in chosen]
        start = self.state
        result = self._aggregator.aggregate(states, weights, names=[f"client {c}" for c in chosen])
        used = [i for i, c in enumerate(chosen) if f"client {c}" in result.report.clients]
        geometry = {}
        if self.config.geometry:
            whole = start if start is None or len(start) == len(self._initial) else None
            kept, shares = [states[i] for i in used], [weights[i] for i in used]
            geometry = alignment_geometry(kept, shares, whole, self._aggregator.method, self.rounds_done)
        for i in used if result.personal else []:
            self._personal[chosen[i]] = {name: states[i][name].clone() for name in result.personal}
        fold(self.clients.model, result)
        self.state = result.state_dict
        if self.config.dtype == "float16":
            self.state = {name: x.clone() for name, x in self.state.items()}
            round_to_float16(self.state.values())
            self._aggregator.reference = self.state  # what clients start from, to the bit
        self.rounds_done += 1
        return result, geometry

    def norms(self) -> dict[str, float | None]:
        """Compute the Frobenius norms of the global adapter's factors over all layers; None for a factor that is not shared.

        Returns:
            "norm_A" and "norm_B".
        """
        squares: dict[str, list[Tensor]] = {"A": [], "B": []}
        for name, x in (self.state or {}).items():
            if (factor := factor_of(name)) is not None:
                squares[factor].append(torch.linalg.vector_norm(x, dtype=torch.float64).square())
        return {f"norm_{f}": torch.stack(some).sum().sqrt().item() if some else None for f, some in squares.items()}

    def evaluate(self) -> dict[str, float]:
        """Measure the global adapter's score and loss on the test examples.

        If clients keep factors of their own, this is the mean over clients, each on its share of the test examples.
        """
        assert self.state is not None
        if len(self.state) == len(self._initial):
            return self.clients.evaluate(self.state)
        test = np.random.default_rng(0).permutation(len(self.clients.task.test))
        measured: dict[str, float] = {}
        for client, rows in enumerate(np.array_split(test, len(self.clients.examples))):
            for name, value in self.clients.evaluate(self.start_of(client), rows).items() if len(rows) else ():
                measured[name] = measured.get(name, 0.0) + value * len(rows) / len(test)
        return measured

    def adapters(self) -> dict[str, State]:
        """Return the final adapters by the names of their folders: one, or one per client."""
        assert self.state is not None
        if len(self.state) == len(self._initial):
            return {"adapter": self.state}
        return {f"adapters/client{c}": self.start_of(c) for c in range(len(self.clients.examples))}

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run needs, by name."""
        assert self.state is not None
        parts: dict[str, State] = {"state": self.state}
        parts |= {f"personal-{client}": state for client, state in self._personal.items()}
        if self._optimizer is not None:
            parts["optimizer"] = self._optimizer.state_dict()
        if self._folds:
            parts["base"] = self._base_weights()
        return {f"{part}/{name}": x for part, state in parts.items() for name, x in state.items()}

    def restore(self, tensors: dict[str, Tensor], rounds_done: int) -> None:
        """Go on from a checkpoint.

        Args:
            tensors: what ``checkpoint`` returned.
            rounds_done: the number of rounds that were done then.
        """
        parts: dict[str, State] = {}
        for full, x in tensors.items():
            part, name = full.split("/", 1)
            parts.setdefault(part, {})[name] = x.to(self.clients.device)
        self.state, self.rounds_done = parts.pop("state"), rounds_done
        if self._optimizer is not None:
            self._optimizer.load_state_dict(parts.pop("optimizer", {}))
        base = self._base_weights()
        for name, x in parts.pop("base", {}).items():
            base[name].copy_(x)
        self._personal = {int(part.removeprefix("personal-")): state for part, state in parts.items()}
        self._aggregator = self._make_aggregator()

    def _base_weights(self) -> State:
        with torch.no_grad():
            return {name: p.data for name, p in self.clients.model.named_parameters() if ".base_layer." in name}
