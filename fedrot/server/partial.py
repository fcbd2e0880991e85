"""Partial aggregates: the sum of a part of a round's clients, which one server sends to another that merges it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..adapters.checks import check_update
from ..adapters.update import Update
from ..errors import UpdateError
from ..methods.base import Method
from .partial_file import read_stream, write_stream
from .stream import StreamedRound

_LONGEST = 200  # characters of another server's options in an error


@dataclass(frozen=True, eq=False)
class PartialAggregate:
    """The clients that a ``FedRotAggregator`` has added, for another's ``merge``; see ``FedRotAggregator.partial``.

    In memory and in a file it is as large as one update in float32 (float64 for float64). If errors are reported, every
    adapter of rank r adds k² + 2 k r numbers in float64 (k = 32), and every client one number per adapter.

    Attributes:
        name: the partial aggregate's name in errors.
        options: the options that servers must have alike to merge their clients.
        stream: the sums.
    """

    name: str
    options: Mapping[str, Any]
    stream: StreamedRound

    @classmethod
    def of(cls, stream: StreamedRound, options: Mapping[str, Any], name: str | None) -> "PartialAggregate":
        """Take over a stream, to which nothing more is added. A name is put before the names of its clients."""
        config = stream.reference.config if stream.reference is not None else None
        stream.first = replace(stream.first, specs=stream.layout.specs, config=config or stream.first.config)
        stream.reference = None
        stream.__dict__.pop("compiled", None)
        if name is not None:
            stream.weights = {f"{name}/{client}": weight for client, weight in stream.weights.items()}
            stream.dropped = {f"{name}/{client}": why for client, why in stream.dropped.items()}
        return cls(name or "the partial aggregate", options, stream)

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients that were added."""
        return tuple(self.stream.weights)

    @property
    def weights(self) -> tuple[float, ...]:
        """The clients' weights, as they were given."""
        return tuple(self.stream.weights.values())

    @property
    def dropped(self) -> dict[str, str]:
        """The clients that were left out, and why."""
        return dict(self.stream.dropped)

    @property
    def first(self) -> Update:
        """What all its clients have in common, with the tensors that none of them trained."""
        first = self.stream.first
        kept = self.stream.frozen | self.stream.counters
        return replace(first, name=self.name, tensors=kept, keys_given={key: key for key in first.specs})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            FileExistsError: the path exists.
        """
        write_stream(path, self.stream, self.options)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PartialAggregate":
        """Read what ``save`` wrote. Every shape and dtype is checked before memory is taken; errors name the path.

        Raises:
            UpdateError: a missing file, a truncated one, or one that contradicts itself.
        """
        return cls(str(os.fspath(path)), *reversed(read_stream(path)))


def compatibility(method: Method, index: int, streamed: StreamedRound) -> dict[str, Any]:
    """The options that servers must have alike to merge their clients."""
    reference = streamed.reference_digest if method.needs_reference(index) else None
    options = {name: getattr(method.options, name) for name in ("method", "align_on", "reflections", "seed")}
    return options | {"strength": method.strength, "round": index, "reference": reference}


def check_mergeable(partial: PartialAggregate, options: Mapping[str, Any], round: StreamedRound) -> None:
    """Raise UpdateError unless a partial aggregation can be added to a round with these options."""
    for field in [*options, *(partial.options.keys() - options.keys())]:
        theirs, mine = partial.options.get(field), options.get(field)
        if theirs != mine and field == "reference":
            raise UpdateError(
                f"{partial.name}: its clients were aligned to another reference than the one here; give all servers of a "
                "round the adapter that the clients started from, bit for bit"
            )
        if theirs != mine:
            raise UpdateError(
                f"{partial.name} has {field} = {str(theirs)[:_LONGEST]}, but this aggregator {mine}; partial aggregations "
                "of one round need the same options"
            )
    config = round.reference.config if round.reference is not None else None
    here = replace(round.first, name="the round here", specs=round.layout.specs, config=config or round.first.config)
    check_update(replace(partial.first, device=here.device), here, round.layout)
    taken = round.weights.keys() | round.dropped.keys()
    for client in (*partial.stream.weights, *partial.stream.dropped):
        if client in taken:
            raise UpdateError(
                f"{partial.name}: its {client} is here already; has it been merged before? If not, give clients names of "
                "their own, with add(…, name=…), or those of their servers, with partial(name=…)"
            )
