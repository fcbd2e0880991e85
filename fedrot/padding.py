"""Clients of unequal ranks and scalings in one average: each in the ranks of the reference, or the widest, by rows of zero.

B·A of a padded client is what it was, and so is s·B·A, because B is multiplied by sᵢ/s. What its rotation makes of it is
a partial isometry: the rows of R that meet its rows of zero are none of its own, and are zero.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedrot_kernels import NOISE, full_precision, procrustes

from .adapters.checks import check_device, check_reference, check_updates
from .adapters.config import check_scaling, same_scaling
from .adapters.keys import TensorSpec
from .adapters.layout import Adapter, Layout
from .adapters.update import Update, UpdateLike, open_update
from .errors import UpdateError
from .scaling import Scalings, scalings, widest_layout

if TYPE_CHECKING:
    from .round import Averages


def are_alike(clients: Sequence[Update]) -> bool:
    """Whether clients have the same shapes and, as far as their configurations are known, the same scaling."""
    first, configs = clients[0], [client.config for client in clients if client.config is not None]
    shapes = all(client.specs is first.specs or client.specs == first.specs for client in clients)
    return shapes and all(config is configs[0] or same_scaling(config, configs[0]) for config in configs)


def common_layout(clients: Sequence[Update]) -> Layout:
    """The layout of clients, with the largest rank of each adapter where ranks differ.

    Raises:
        UpdateError: clients that differ in more than ranks and scalings.
    """
    if are_alike(clients):
        return check_updates(clients)
    first = clients[0]
    layout = Layout(first.specs, first.name)
    for client in clients[1:]:
        layout.check_keys(client.specs, client.name, first.name)
        _check_kind(client, first)
    return widest_layout(clients)


def check_padded(client: Update, first: Update, layout: Layout, whose: str) -> None:
    """Raise UpdateError unless the client has this layout but for smaller ranks; ``whose`` ranks the layout has."""
    _check_kind(client, first)
    if client.specs == first.specs:
        return
    layout.check_keys(client.specs, client.name, first.name)
    Layout(client.specs, client.name)  # refuses factors that do not fit each other
    specs = dict(client.specs)
    for key, axis in _factors(layout):
        _check_narrow(client, key, axis, layout.specs[key].shape, whose)
        specs[key] = _with_rank(specs[key], axis, layout.specs[key].shape[axis])
    layout.check(specs, client.name, first.name)


def open_wide_reference(
    reference: UpdateLike, config: dict[str, Any] | None, clients: Sequence[Update], layout: Layout
) -> tuple[Update, Layout]:
    """The reference as an Update, all finite and with its configuration, and the clients' layout in its ranks.

    Args:
        reference: the clients' adapters, in ranks that none of the clients exceeds.
        config: its configuration, if it does not bring one.
        clients: of the layout, but for ranks.
        layout: of the clients.

    Raises:
        UpdateError: it lacks an adapter, or has one in another shape or of a smaller rank.
    """
    first = clients[0]
    opened = open_update(reference, "the reference", first)
    if opened.specs is not first.specs:
        specs = dict(layout.specs)
        for key, axis in _factors(layout):
            shape = specs[key].shape
            theirs = opened.specs[key].shape if key in opened.specs else shape
            if theirs != shape and len(theirs) > axis and theirs == _with_rank(specs[key], axis, theirs[axis]).shape:
                for client in clients:
                    _check_narrow(client, key, axis, theirs, opened.name)
                specs[key] = _with_rank(specs[key], axis, theirs[axis])
        layout = layout if specs == layout.specs else Layout(specs, opened.name)
        first = replace(first, specs=layout.specs)
    check_scaling(opened.config, opened.name, first.config, first.name, ("use_dora",))
    bare = first if first.config is None else replace(first, config=None)
    checked = check_reference(opened, bare, layout, finite=opened is reference)
    return (checked if checked.config or not config else replace(checked, config=config)), layout


def scalings_if_unlike(clients: Sequence[Update], layout: Layout, reference: Update | None) -> Scalings | None:
    """The scalings of clients, of which some have other ranks or another scaling than the result; None if all are alike.

    Args:
        clients: of the layout, but for ranks.
        layout: of the result.
        reference: whose configuration the result has, if it has one.
    """
    config = reference.config if reference is not None else None
    others = [] if config is None else [replace(clients[0], config=config)]
    if clients[0].specs == layout.specs and are_alike([*clients, *others]):
        return None
    return scalings(clients, layout, config)


def padded(client: Update, layout: Layout, s_client: dict[str, float], s_result: dict[str, float]) -> Update:
    """The client in the layout's ranks and the result's scaling; factors in float32 (float64 for float64), not yet rounded.

    Args:
        client: of the layout, but for smaller ranks.
        layout: of the result.
        s_client, s_result: module → s.
    """
    tensors = {key: client[key] for key in layout.plain}
    ranks = {a.key_A: client.specs[a.key_A].shape[0] for a in layout.adapters}
    for a in layout.adapters:
        s = s_client[a.module] / s_result[a.module]
        A, B = (_wide(client[key].detach()) for key in (a.key_A, a.key_B))
        tensors[a.key_A] = _with_zeros(A, 0, a.rank)
        tensors[a.key_B] = _with_zeros(B if s == 1 else B * s, 1, a.rank)
        if (bias := f"{a.module}.lora_B.bias") in tensors:
            tensors[bias] = _wide(tensors[bias].detach()) * s
    keys_given = {key: key for key in layout.specs}
    narrow = any(ranks[a.key_A] < a.rank for a in layout.adapters)
    return Update(client.name, layout.specs, keys_given, tensors, client.device, None, ranks if narrow else None)


def trainable(mean: dict[str, Tensor], layout: Layout, reference: Update) -> dict[str, Tensor]:
    """The mean, with the reference's row of A where both a row of A and its column of B are zero: ranks that no client of a
    round has. B·A stays what it is; of two zeros neither would ever have a gradient again.

    Args:
        mean: canonical key → mean, in the layout's shapes and dtypes.
        reference: of the layout's ranks.
    """
    for a in layout.adapters:
        A, B = mean[a.key_A], mean[a.key_B]
        dead = ~(A.flatten(1).any(1) | B.transpose(0, 1).flatten(1).any(1))
        if bool(dead.any()):
            kept = reference[a.key_A].detach().to(A.device, A.dtype).reshape(A.shape)
            mean = mean | {a.key_A: torch.where(dead.reshape(-1, *[1] * (A.dim() - 1)), kept, A)}
    return mean


def rounded(averages: "Averages", layout: Layout, clients: Sequence[Update], reference: Update | None) -> "Averages":
    """The averages of padded clients in the layout's dtypes, and rotations with rows of zero where a client has none; see
    ``trainable`` for the reference."""
    mean = {key: x.to(layout.specs[key].dtype) for key, x in averages.mean.items()}
    if reference is not None:
        mean = trainable(mean, layout, reference)
    R = averages.R
    if R is not None:
        R = [x * own_rows(a, clients).to(x.device) for a, x in zip(layout.adapters, R, strict=True)]
    return replace(averages, mean=mean, R=R)


def widest(clients: Sequence[Update], weights: Sequence[float], layout: Layout) -> Update:
    """Of the clients that count, the one of the largest ranks; of several that of the largest weight, of those the first."""
    total = sum(a.rank for a in layout.adapters)
    ranks = [total if client.ranks is None else sum(client.ranks.values()) for client in clients]
    return clients[max(range(len(clients)), key=lambda i: (weights[i] > 0, ranks[i], weights[i]))]


def own_rows(adapter: Adapter, clients: Sequence[Update]) -> Tensor:
    """(N, r, 1), bool: which rows of an adapter are the clients' own, not padded."""
    own = [adapter.rank if client.ranks is None else client.ranks[adapter.key_A] for client in clients]
    return torch.arange(adapter.rank)[None, :, None] < torch.tensor(own)[:, None, None]


@full_precision
def partial_isometries(M: Tensor, rows: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The rotations of padded clients, softened, and how far they are from orthogonal.

    Rᵢ is polar((1−λ) J + λ polar(Mᵢ)), J = [I 0], of the client's own rows, as the rows of a square matrix that is zero in
    the others. It is the same in SO and O: what the others complete it to may have either determinant.

    Args:
        M: (G, r, r), cross-covariances; rows of zero where a client has none.
        rows: (G, r, 1), which rows are the client's own.
        strength: λ.

    Returns:
        R (G, r, r), and ‖RᵀR − I‖_max (G,) before the others are zero.
    """
    R, residual = procrustes(M, noise=NOISE[M.dtype])
    if strength < 1:
        eye = torch.eye(M.shape[-1], dtype=R.dtype, device=R.device)
        R, residual = procrustes(torch.where(rows, (1 - strength) * eye + strength * R, 0), noise=NOISE[R.dtype])
    return R * rows, residual


def _check_kind(client: Update, first: Update) -> None:
    check_device(client, first)
    check_scaling(client.config, client.name, first.config, first.name, ("use_dora",))


def _check_narrow(client: Update, key: str, axis: int, shape: tuple[int, ...], whose: str) -> None:
    if client.specs[key].shape[axis] > shape[axis]:
        raise UpdateError(
            f"{client.name}, {key}: shape {client.specs[key].shape}, but {whose} has {shape}; no client's rank may exceed "
            "that of the adapter that clients started from"
        )


def _factors(layout: Layout) -> list[tuple[str, int]]:
    """Keys and the axes that hold their ranks."""
    return [(key, axis) for keys in layout.factor_keys for axis, key in enumerate(keys)]


def _with_rank(spec: TensorSpec, axis: int, rank: int) -> TensorSpec:
    return replace(spec, shape=(*spec.shape[:axis], rank, *spec.shape[axis + 1 :]))


def _with_zeros(x: Tensor, axis: int, rank: int) -> Tensor:
    if x.shape[axis] == rank:
        return x
    zeros = x.new_zeros(_with_rank(TensorSpec(tuple(x.shape), x.dtype), axis, rank - x.shape[axis]).shape)
    return torch.cat([x, zeros], dim=axis)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
