"""What a server keeps from round to round: the reference and its configuration, the round, the server optimizer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..adapters.update import UpdateLike, open_update
from ..methods.registry import make_method
from ..options import AggregationOptions, refuse_old_spellings, whole_number
from ..report.result import AggregationResult
from .finish import AveragedRound, factors_except, finish, restore
from .optimizer import ServerOptimizer


class ServerState:
    """The state of a server between two rounds, and its step from one to the next.

    Args:
        options: the options, which name the method.
        reference: the adapter that the clients start from, or None.
        round: the index of the next round, from 0.
        server_optimizer: steps from the reference towards each round's mean, or None.

    Attributes:
        options: as given.
        method: the method that the options name.
        round: the index of the next round.
        server_optimizer: as given.

    Raises:
        ValueError: an unknown method, or one that takes no server optimizer.
    """

    def __init__(
        self,
        options: AggregationOptions,
        reference: UpdateLike | None,
        round: int,
        server_optimizer: ServerOptimizer | None,
    ):
        self.options, self.method = options, make_method(options)
        if not isinstance(server_optimizer, ServerOptimizer | None):
            raise ValueError(
                f"server_optimizer must be a fedrot.ServerOptimizer or None, got {server_optimizer!r}; pass "
                'fedrot.ServerOptimizer("momentum", lr=…) or fedrot.ServerOptimizer("adam", lr=…), and None for none'
            )
        if server_optimizer is not None and not self.method.supports_server_optimizer:
            raise ValueError(
                f"{self.method.name}'s result is no mean in the basis of the last one, towards which a server optimizer "
                "could step; leave it out, or take another method"
            )
        self.round, self.server_optimizer = whole_number("round", round), server_optimizer
        self._reference: dict[str, Tensor] | None = None
        self._config: dict[str, Any] | None = None
        self.reference = reference

    @property
    def reference(self) -> dict[str, Tensor] | None:
        """The adapter that the clients of the next round start from, a state dict; None if they have none in common.

        It can be set to a state dict, a folder, a pair of a state dict and its LoRA configuration, or None. A state dict
        keeps the configuration of the reference before it; None forgets that configuration.

        Raises:
            UpdateError: a folder that cannot be read.
        """
        return self._reference

    @reference.setter
    def reference(self, reference: UpdateLike | None) -> None:
        refuse_old_spellings({"reference": reference})
        if isinstance(reference, Mapping) or reference is None:
            self._reference = None if reference is None else dict(reference)
            self._config = None if reference is None else self._config
            return
        opened = open_update(reference, "the reference")
        self._reference = opened.as_given(opened)
        self._config = opened.config

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs between two rounds: tensors and plain Python data.

        ``torch.save`` writes it, and ``torch.load(…, weights_only=True)`` reads it.

        Returns:
            "round", the index of the next round; "reference", a state dict or None; "config", the reference's LoRA
            configuration or None; "server_optimizer", its state, empty without one.
        """
        optimizer = {} if self.server_optimizer is None else self.server_optimizer.state_dict()
        return {"round": self.round, "reference": self._reference, "config": self._config, "server_optimizer": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` of a server with the same options returned.

        Raises:
            ValueError: not such a state, or the state of another server optimizer.
        """
        if missing := [name for name in ("round", "reference", "config", "server_optimizer") if name not in state]:
            raise ValueError(f"the state lacks {', '.join(missing)}; pass what state_dict() returned")
        if state["server_optimizer"] and self.server_optimizer is None:
            raise ValueError("the state has that of a server optimizer; give this aggregator one too")
        if not isinstance(state["reference"], Mapping | None):
            raise ValueError(
                f"the state's reference is {type(state['reference']).__name__}; pass what state_dict() returned"
            )
        index = whole_number("round", state["round"])
        if self.server_optimizer is not None:
            reference = state["reference"]
            opened = None if reference is None else open_update(reference, "the state's reference")
            self.server_optimizer.load_state_dict(state["server_optimizer"], opened)
        self.reference = state["reference"]
        self.round, self._config = index, state["config"]

    def close(self, averaged: AveragedRound) -> AggregationResult:
        """Restore, step and finish a round; the result becomes the next round's reference."""
        method = self.method
        mean, reference, optimizer = restore(averaged, method), averaged.reference, self.server_optimizer
        check = averaged.may_overflow
        if optimizer is not None and reference is not None:
            frozen = factors_except(averaged.layout, method.trains(self.round))
            mean, check = optimizer.step(reference, mean, averaged.layout.specs, frozen), True
        config = (reference.config if reference is not None else None) or self._config or averaged.config
        result = finish(averaged, mean, method, config, check=check)
        self._config = result.config if method.changes_ranks else config
        self._reference, self.round = result.state_dict, self.round + 1
        return result
