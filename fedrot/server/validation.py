"""Checks of a round's updates before they are averaged: one layout, finite entries, a reference that fits."""

from collections.abc import Sequence
from typing import Any

from ..adapters.checks import check_device, check_update, check_updates, not_finite, open_reference
from ..adapters.layout import Layout
from ..adapters.update import Update, UpdateLike, open_update
from ..errors import UpdateError
from ..methods.base import Method
from ..ranks.checks import check_padded, common_layout, open_wide_reference, widest_layout
from ..ranks.padding import pad
from ..ranks.scaling import Scalings, check_biases, scalings, scalings_if_unlike


class RoundValidator:
    """Checks what a method can average, and brings it to one layout.

    Args:
        method: the method, which decides whether clients may differ in ranks and scaling.
    """

    def __init__(self, method: Method):
        self.method = method

    def start(
        self, reference: UpdateLike | None, config: dict[str, Any] | None, clients: Sequence[Update]
    ) -> tuple[Update | None, Layout]:
        """Open the reference and find the clients' layout, in the reference's ranks if the method pads to those.

        Args:
            reference: the adapter that the clients started from, if that is known.
            config: the reference's LoRA configuration, if the reference does not bring one.
            clients: the clients of the round, at least one.

        Raises:
            UpdateError: clients that the method cannot average, or another reference than theirs.
        """
        layout = self._layout(clients)
        if reference is None:
            return None, layout
        if self.method.unequal_ranks == "pad":
            return open_wide_reference(reference, config, clients, layout)
        if self.method.unequal_ranks == "stack" or self.method.returns() != ("A", "B"):  # it may have other shapes, or no B
            return open_update(reference, "the reference"), layout
        return open_reference(reference, clients[0], layout), layout

    def _layout(self, clients: Sequence[Update]) -> Layout:
        if self.method.unequal_ranks == "pad":
            layout = common_layout(clients)
        elif self.method.unequal_ranks == "no":
            layout = check_updates(clients)
        else:
            for client in clients[1:]:
                check_device(client, clients[0])
            layout = widest_layout(clients)
        self.method.check(layout)
        return layout

    def scalings(self, clients: Sequence[Update], layout: Layout, reference: Update | None) -> Scalings | None:
        """The scalings of clients and result, or None where they play no part."""
        if self.method.unequal_ranks == "pad":
            return scalings_if_unlike(clients, layout, reference)
        s = scalings(clients, layout) if self.method.unequal_ranks == "stack" else None
        if s is not None:
            check_biases(layout, s)
        return s

    def needs_finite_inputs(self, s: Scalings | None) -> bool:
        """Whether inputs must be checked for NaN first. Gram-space methods and padding would spread a NaN or hide it."""
        return self.method.needs_all or (self.method.unequal_ranks == "pad" and s is not None)

    def pad(self, clients: Sequence[Update], layout: Layout, s: Scalings | None) -> list[Update]:
        """The clients in the layout's ranks and the result's scaling, if the method pads and they have others."""
        if s is None or self.method.unequal_ranks != "pad":
            return list(clients)
        return [pad(c, layout, of_client, s.result) for c, of_client in zip(clients, s.per_client, strict=True)]

    def check_next(self, client: Update, first: Update, layout: Layout, reference: Update | None) -> None:
        """Raise UpdateError unless a client fits a round that another one began."""
        if self.method.unequal_ranks == "pad":
            check_padded(client, first, layout, (reference or first).name)
        else:
            check_update(client, first, layout)

    def valid(
        self, clients: Sequence[Update], weights: Sequence[float], dropped: dict[str, str]
    ) -> tuple[list[Update], list[float]]:
        """The clients without NaN and Inf, and their weights; the others are added to ``dropped``.

        Raises:
            UpdateError: there is one, with ``on_invalid="raise"``, or none of positive weight is left.
        """
        kept = [(client, w) for client, w in zip(clients, weights, strict=True) if self.is_valid(client, dropped)]
        if not any(w for _, w in kept):
            raise nothing_left(dropped)
        return [client for client, _ in kept], [w for _, w in kept]

    def is_valid(self, client: Update, dropped: dict[str, str]) -> bool:
        """Whether a client has neither NaN nor Inf; see ``valid``."""
        found = not_finite(client)
        if found and self.method.options.on_invalid == "raise":
            raise UpdateError(f'{client.name}, {found}; leave this client out, or drop such clients (on_invalid="drop")')
        if found:
            dropped[client.name] = found
        return not found


def nothing_left(dropped: dict[str, str]) -> UpdateError:
    """The error of a round without a client that counts."""
    reasons = "".join(f"; dropped {client}: {why}" for client, why in dropped.items())
    return UpdateError(f"nothing to average: no client of positive weight is left{reasons}")
