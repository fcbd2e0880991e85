"""What a method asks of the updates of a round before it averages them: one layout, sound entries, a reference that fits."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from ..adapters.checks import check_device, check_update, check_updates, not_finite, open_reference
from ..adapters.layout import Layout
from ..adapters.update import Update, UpdateLike, open_update
from ..errors import UpdateError
from ..methods.base import Method
from ..ranks.checks import check_padded, common_layout, open_wide_reference, widest_layout
from ..ranks.padding import padded
from ..ranks.scaling import Scalings, check_biases, scalings, scalings_if_unlike

OnInvalid = Literal["raise", "drop"]


class Intake:
    """Opens a method's rounds.

    Args:
        method: which decides whether clients may differ in ranks and scaling.
        on_invalid: "raise" on NaN or Inf in an update, or "drop" that client.
    """

    def __init__(self, method: Method, on_invalid: OnInvalid):
        if on_invalid not in get_args(OnInvalid):
            raise ValueError(f"on_invalid must be one of {', '.join(get_args(OnInvalid))}, got {on_invalid!r}")
        self.method, self.on_invalid = method, on_invalid

    def start(
        self, reference: UpdateLike | None, config: dict[str, Any] | None, clients: Sequence[Update]
    ) -> tuple[Update | None, Layout]:
        """The reference as an Update, and the clients' layout: in its ranks, if the method pads to those.

        Args:
            reference: what the clients started from, if that is known.
            config: the reference's LoRA configuration, if it does not bring one.
            clients: of the round, at least one.

        Raises:
            UpdateError: clients that the method cannot average, or another reference than theirs.
        """
        layout = self._layout(clients)
        if reference is None:
            return None, layout
        if self.method.pads:
            return open_wide_reference(reference, config, clients, layout)
        if self.method.unequal_ranks or self.method.returns() != ("A", "B"):  # the reference may have other shapes, or no B
            return open_update(reference, "the reference"), layout
        return open_reference(reference, clients[0], layout), layout

    def _layout(self, clients: Sequence[Update]) -> Layout:
        if self.method.pads:
            layout = common_layout(clients)
        elif not self.method.unequal_ranks:
            layout = check_updates(clients)
        else:
            for client in clients[1:]:
                check_device(client, clients[0])
            layout = widest_layout(clients)
        self.method.check(layout)
        return layout

    def scalings(self, clients: Sequence[Update], layout: Layout, reference: Update | None) -> Scalings | None:
        """The scalings of clients and result, where they play a part."""
        if self.method.pads:
            return scalings_if_unlike(clients, layout, reference)
        s = scalings(clients, layout) if self.method.unequal_ranks else None
        if s is not None:
            check_biases(layout, s)
        return s

    def must_be_sound(self, clients: Sequence[Update], layout: Layout, reference: Update | None) -> bool:
        """Whether NaN must be looked for before averaging, whose algebra would not survive it or not show it."""
        return self.method.needs_all or (self.method.pads and self.scalings(clients, layout, reference) is not None)

    def padded(self, clients: Sequence[Update], layout: Layout, s: Scalings | None) -> list[Update]:
        """The clients in the layout's ranks and the result's scaling, if the method pads and they are not so already."""
        if s is None or not self.method.pads:
            return list(clients)
        return [padded(c, layout, of_client, s.of_result) for c, of_client in zip(clients, s.of_clients, strict=True)]

    def check_next(self, client: Update, first: Update, layout: Layout, reference: Update | None) -> None:
        """Raise UpdateError unless a client fits a round that another began."""
        if self.method.pads:
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
        if found and self.on_invalid == "raise":
            raise UpdateError(f'{client.name}, {found}; leave this client out, or drop such clients (on_invalid="drop")')
        if found:
            dropped[client.name] = found
        return not found


def nothing_left(dropped: dict[str, str]) -> UpdateError:
    """The error of a round without a client that counts."""
    reasons = "".join(f"; dropped {client}: {why}" for client, why in dropped.items())
    return UpdateError(f"nothing to average: no client of positive weight is left{reasons}")
