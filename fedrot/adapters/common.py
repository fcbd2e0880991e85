"""The layout that the clients of a round have in common, with the largest ranks where ranks may differ."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from ..errors import UpdateError
from .checks import check_kind, check_reference, check_update, check_updates
from .keys import TensorSpec, parse_factor
from .layout import Layout
from .meaning import check_meaning, scaling_fields
from .update import Update, UpdateLike, open_update

# "no" if clients must have one rank and scaling, "pad" if they are padded to those of the reference, "stack" if any will do.
UnequalRanks = Literal["no", "pad", "stack"]


def start_round(
    clients: Sequence[Update],
    unequal_ranks: UnequalRanks,
    reference: UpdateLike | None,
    config: dict[str, Any] | None,
    *,
    whole: bool,
) -> tuple[Layout, Update | None]:
    """Find the layout of a round's clients, and open the reference.

    Args:
        clients: the clients, at least one.
        unequal_ranks: whether their ranks and scalings may differ; with "pad" the layout has the reference's ranks.
        reference: the adapter that the clients started from, if that is known.
        config: the reference's LoRA configuration, if the reference does not bring one.
        whole: whether the reference must have both factors in the clients' shapes.

    Raises:
        UpdateError: clients that cannot be averaged, or another reference than theirs.
    """
    if unequal_ranks == "pad":
        layout = common_layout(clients)
        return (layout, None) if reference is None else open_wide_reference(reference, config, clients, layout)
    if unequal_ranks == "no":
        layout = check_updates(clients)
    else:
        for client in clients[1:]:
            check_kind(client, clients[0])
        layout = widest_layout(clients)
    if reference is None:
        return layout, None
    fits = whole and unequal_ranks == "no"
    opened = open_update(reference, "the reference", clients[0])
    if opened.config is None and config is not None:
        opened = replace(opened, config=config)
    check_meaning(opened.config, opened.name, clients[0].config, clients[0].name)
    return layout, check_reference(opened, clients[0], layout, finite=opened is reference) if fits else opened


def check_next(client: Update, first: Update, layout: Layout, reference: Update | None, unequal_ranks: UnequalRanks) -> None:
    """Raise UpdateError unless a client fits a round that another one began."""
    if unequal_ranks == "pad":
        check_padded(client, first, layout, (reference or first).name)
    else:
        check_update(client, first, layout)


def widest_layout(clients: Sequence[Update]) -> Layout:
    """The layout of clients that differ in ranks only, with the largest rank of each adapter.

    Raises:
        UpdateError: clients that differ in keys, other shapes or dtypes.
    """
    for client in clients:
        Layout.of(client.specs, client.name)  # refuses factors that do not fit each other
    ranks: dict[str, int] = {}
    for client in clients:
        for key, axis in _rank_axes(client):
            ranks[key] = max(ranks.get(key, 0), client.specs[key].shape[axis])
    widened = []
    for client in clients:
        specs = dict(client.specs)
        for key, axis in _rank_axes(client):
            shape = list(specs[key].shape)
            shape[axis] = ranks[key]
            specs[key] = replace(specs[key], shape=tuple(shape))
        widened.append(specs)
    layout = Layout(widened[0], clients[0].name)
    for client, specs in zip(clients[1:], widened[1:], strict=True):
        layout.check(specs, client.name, clients[0].name)
    return layout


def _rank_axes(client: Update) -> list[tuple[str, int]]:
    """The keys of a client's factors, and the axes of their ranks."""
    parsed = ((key, parse_factor(key)) for key in client.specs)
    return [(key, 0 if p.factor == "A" else 1) for key, p in parsed if p]


def are_alike(clients: Sequence[Update]) -> bool:
    """Whether clients have one set of shapes and, as far as their configurations are known, one scaling."""
    first, configs = clients[0], [client.config for client in clients if client.config is not None]
    shapes = all(client.specs is first.specs or client.specs == first.specs for client in clients)
    return shapes and all(config is configs[0] or scaling_fields(config) == scaling_fields(configs[0]) for config in configs)


def common_layout(clients: Sequence[Update]) -> Layout:
    """The layout of clients whose ranks and scalings may differ, with the largest rank of each adapter.

    Raises:
        UpdateError: clients that differ in more than ranks and scalings.
    """
    if are_alike(clients):
        return check_updates(clients)
    first = clients[0]
    layout = Layout.of(first.specs, first.name)
    for client in clients[1:]:
        layout.check_keys(client.specs, client.name, first.name)
        check_kind(client, first)
    return widest_layout(clients)


def check_padded(client: Update, first: Update, layout: Layout, whose: str) -> None:
    """Raise UpdateError unless a client has the layout, or smaller ranks than it.

    Args:
        client: the client.
        first: the first client of the round.
        layout: the layout of the result.
        whose: the name of the update whose ranks the layout has, for errors.
    """
    check_kind(client, first)
    if client.specs is first.specs or client.specs == first.specs:
        return
    layout.check_keys(client.specs, client.name, first.name)
    Layout.of(client.specs, client.name)  # refuses factors that do not fit each other
    specs = dict(client.specs)
    for key, axis in _factors(layout):
        _check_narrow(client, key, axis, layout.specs[key].shape, whose)
        specs[key] = with_rank(specs[key], axis, layout.specs[key].shape[axis])
    layout.check(specs, client.name, first.name)


def open_wide_reference(
    reference: UpdateLike, config: dict[str, Any] | None, clients: Sequence[Update], layout: Layout
) -> tuple[Layout, Update]:
    """Open the reference of clients that are padded to its ranks.

    Args:
        reference: the clients' adapters, in ranks that no client exceeds.
        config: the reference's configuration, if the reference does not bring one.
        clients: the clients, which have the layout but for their ranks.
        layout: the clients' common layout.

    Returns:
        The layout in the reference's ranks, and the reference, all finite and with its configuration.

    Raises:
        UpdateError: a reference that lacks an adapter, or has one in another shape or of a smaller rank.
    """
    first = clients[0]
    opened = open_update(reference, "the reference", first)
    if opened.specs is not first.specs:
        specs = dict(layout.specs)
        for key, axis in _factors(layout):
            shape = specs[key].shape
            theirs = opened.specs[key].shape if key in opened.specs else shape
            if theirs != shape and len(theirs) > axis and theirs == with_rank(specs[key], axis, theirs[axis]).shape:
                for client in clients:
                    _check_narrow(client, key, axis, theirs, opened.name)
                specs[key] = with_rank(specs[key], axis, theirs[axis])
        layout = layout if specs == layout.specs else Layout(specs, opened.name)
        first = replace(first, specs=layout.specs)
    check_meaning(opened.config or config, opened.name, first.config, first.name)
    bare = first if first.config is None else replace(first, config=None)
    checked = check_reference(opened, bare, layout, finite=opened is reference)
    return layout, checked if checked.config or not config else replace(checked, config=config)


def _check_narrow(client: Update, key: str, axis: int, shape: tuple[int, ...], whose: str) -> None:
    if client.specs[key].shape[axis] > shape[axis]:
        raise UpdateError(
            f"{client.name}, {key}: shape {client.specs[key].shape}, but {whose} has {shape}; no client's rank may exceed "
            "that of the adapter that clients started from"
        )


def _factors(layout: Layout) -> list[tuple[str, int]]:
    """The keys of a layout's factors, and the axes of their ranks."""
    return [(key, axis) for keys in layout.factor_keys for axis, key in enumerate(keys)]


def with_rank(spec: TensorSpec, axis: int, rank: int) -> TensorSpec:
    """The spec with another size of one axis."""
    return replace(spec, shape=(*spec.shape[:axis], rank, *spec.shape[axis + 1 :]))
