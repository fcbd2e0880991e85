"""The quantities of FedRot-LoRA's analysis (arXiv 2602.23638): how far clients moved, and which part rotation removes.

All numbers are computed in float64, whatever the clients train in, because distances near the reference are small
differences of large numbers.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedrot_kernels import error_bound, frame_rotations, full_precision

from ..adapters.checks import check_updates, open_reference
from ..adapters.layout import AdapterGroup, Layout
from ..adapters.update import StateDict, Update, UpdateLike, open_updates
from ..methods.base import Method
from ..methods.groupwise import GroupwiseMethod
from ..methods.round import Round

_ENTRIES = 1 << 22  # how many entries of the clients' factors are copied at a time


def alignment_geometry(
    states: Sequence[StateDict], weights: Sequence[float], reference: UpdateLike | None, method: Method, round: int
) -> dict[str, float]:
    """Measure the geometry of one round's N clients, over all adapters of the model, for F = A and for F = Bᵀ.

    Rᵢ is the full Procrustes rotation, or rotation and reflection if the method allows these, whatever the strength and the
    factor of the round, so that methods can be compared.

    - removed_F is 1 − Σ wᵢ‖RᵢᵀFᵢ − F_ref‖² / Σ wᵢ‖Fᵢ − F_ref‖², sums over clients and adapters: the part of the squared
      distance to the reference that rotation removes. It is left out if no client has moved.
    - turn_per_distance_F and turn_per_distance_F_max are ‖Rᵢ − I‖_F / ‖Fᵢ − F_ref‖_F, the mean over adapters and, by weight,
      clients, and the largest. They are left out if no client has moved.
    - smallest_distance_F and smallest_relative_distance_F are the least ‖Fᵢ − F_ref‖_F and ‖Fᵢ − F_ref‖_F / ‖F_ref‖_F over
      clients and adapters. The latter is left out if F_ref = 0, as is B of a shared start, from which nothing turns.
    - error_bound is the bound Σ wᵢ ‖Bᵢ−B̄‖_F ‖Aᵢ−Ā‖_F on the aggregation error, for the factors as the method averages
      them: the root of the sum of squares over adapters, as the error is.

    Args:
        states: the trained adapters that were averaged, without those of dropped clients.
        weights: one per client, non-negative, not all zero.
        reference: the adapter that the clients started from. None, if they have none in common, takes the adapter of the
            largest weight, as ``aggregate`` does; that client's own distance, zero, does not count.
        method: the method that averages them.
        round: the round index, from 0.

    Returns:
        The quantities by name.
    """
    clients = open_updates(states)
    layout = check_updates(clients)
    w = torch.tensor(weights, dtype=torch.float64, device=clients[0].device)
    w = w / w.sum()
    largest = int(w.argmax())
    method = method if reference is not None else method.without_reference()
    target = clients[largest] if reference is None else open_reference(reference, clients[0], layout)
    counted = [i for i in range(len(clients)) if reference is not None or i != largest]
    others = [clients[i] for i in counted]
    row: dict[str, float] = {}
    for factor in ("A", "B") if others else ():
        measured = [_distances(F, F_ref, method) for F, F_ref in _frames(layout, others, target, factor)]
        row |= _summary(factor, torch.cat(measured, dim=2), w[counted])
    return row | {"error_bound": _bound(layout, clients, w, target, method, round)}


@full_precision
def _distances(F: Tensor, F_ref: Tensor, method: Method) -> Tensor:
    """‖F − F_ref‖, ‖RᵀF − F_ref‖, ‖R − I‖ and ‖F_ref‖, (4, N, G), for F (N, G, r, d) and F_ref (G, r, d)."""
    R = frame_rotations([(F, F_ref)], reflections=method.options.reflections).R.double()
    F, F_ref = F.double(), F_ref.double()
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    size = torch.linalg.matrix_norm(F_ref).expand(F.shape[:2])
    return torch.stack([*(torch.linalg.matrix_norm(D) for D in (F - F_ref, R.mT @ F - F_ref, R - eye)), size])


def _summary(factor: str, measured: Tensor, w: Tensor) -> dict[str, float]:
    """Summarise the distances of one factor (4, N, L), by the clients' weights (N,)."""
    before, after, turn, size = measured
    w = w[:, None].expand_as(before)
    moved = before > 0
    row = {}
    if total := float((w * before.square()).sum()):
        row[f"removed_{factor}"] = 1 - float((w * after.square()).sum()) / total
        ratio = turn[moved] / before[moved]
        row[f"turn_per_distance_{factor}"] = float((w[moved] * ratio).sum() / w[moved].sum())
        row[f"turn_per_distance_{factor}_max"] = float(ratio.max())
    row[f"smallest_distance_{factor}"] = float(before.min())
    if bool((size > 0).any()):
        row[f"smallest_relative_distance_{factor}"] = float((before / size)[size > 0].min())
    return row


def _bound(layout: Layout, clients: Sequence[Update], w: Tensor, target: Update, method: Method, round: int) -> float:
    prepared = _prepare(layout, clients, w, target, method, round)
    bounds: list[float] = []
    for number, group in enumerate(layout.groups):
        for part, rows in _parts(group, len(clients)):
            A = torch.stack([part.A(tensors) for tensors, _ in prepared], dim=1).double()
            B = torch.stack([part.B(tensors) for tensors, _ in prepared], dim=1).double()
            if prepared[0][1] is not None:
                found = [rotations[number][rows] for _, rotations in prepared if rotations is not None]
                R = torch.stack(found, dim=1)
                A, B = R.mT.double() @ A, B @ R.double()
            bounds += error_bound(A, B, w).tolist()
    return math.hypot(*bounds)


def _prepare(
    layout: Layout, clients: Sequence[Update], w: Tensor, target: Update, method: Method, round: int
) -> list[tuple[StateDict, list[Tensor] | None]]:
    """Each client's tensors as they enter the mean and, per group of the layout, its rotations (G, r, r), or None."""
    if not isinstance(method, GroupwiseMethod):
        given = [method.prepare(round, client, i, layout, target) for i, client in enumerate(clients)]
        return [(tensors, None if found is None else [x.R for x in found]) for tensors, found in given]
    averages = method.aggregate(Round(round, layout, clients, range(len(clients)), w.tolist(), target, None))
    if averages.R is None:
        return [(client, None) for client in clients]
    R = {a.key_A: rotations for a, rotations in zip(layout.adapters, averages.R, strict=True)}
    return [
        (client, [torch.stack([R[a.key_A][i] for a in group.adapters]) for group in layout.groups])
        for i, client in enumerate(clients)
    ]


def _frames(layout: Layout, clients: Sequence[Update], target: Update, factor: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield F (N, G, r, d) of the clients and F_ref (G, r, d), some adapters of one shape at a time."""
    for group in layout.groups:
        for part, _ in _parts(group, len(clients)):
            F = [part.A(x) if factor == "A" else part.B(x).mT for x in (*clients, target)]
            yield torch.stack(F[:-1]), F[-1]


def _parts(group: AdapterGroup, clients: int) -> Iterator[tuple[AdapterGroup, slice]]:
    """Yield parts of a group whose copies stay small, with their places in the group."""
    a = group.adapters[0]
    size = max(1, _ENTRIES // (clients * a.rank * max(a.d_in, a.d_out)))
    for start in range(0, len(group.adapters), size):
        rows = slice(start, start + size)
        yield AdapterGroup(group.adapters[rows]), rows
