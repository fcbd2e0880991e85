"""One round's updates, rotated and averaged."""

from collections.abc import Callable

import torch
from torch import Tensor

import fedrot_kernels as fk

from ..adapters.columns import client_factors
from ..adapters.layout import Layout, as_matrix
from ..adapters.update import StateDict, Update
from ..adapters.values import is_finite
from ..options import AggregationOptions, Factor
from .rotation import LARGEST_RESIDUAL, trained_references
from .round import Averages, Round
from .running_mean import RunningMean

Prepare = Callable[[int, Update, int, Layout, Update | None], tuple[StateDict, list[fk.Rotations] | None]]


def average_round(round: Round, options: AggregationOptions, on: tuple[Factor, ...] = (), strength: float = 1.0) -> Averages:
    """Align clients on the given factors (none: as they come) and average them. One synchronisation with a device.

    Args:
        round: the updates.
        options: the backend, whether rotations are in O(r), not SO(r), and whether to estimate errors.
        on: the factors that are aligned.
        strength: λ.
    """
    backend, sketch_seed = options.backend, options.seed if options.report_error == "estimate" else None
    layout = round.layout
    A, B = client_factors(layout, round.clients)
    mean: dict[str, Tensor] = {}
    checks: list[Tensor] = []
    if layout.other_keys:
        others = [[client[key] for client in round.clients] for key in layout.other_keys]
        means, finite = fk.average(others, round.weights, backend=backend)
        mean |= zip(layout.other_keys, means, strict=True)
        checks.append(finite)
    R = residual = undetermined = angles = None
    factors: fk.Aligned | fk.Averaged
    if on:
        A_ref, B_ref = trained_references(layout.adapters, round.reference, on)
        factors = fk.align_average(
            A,
            B,
            round.weights,
            A_ref=A_ref if "A" in on else None,
            B_ref=B_ref if "B" in on else None,
            strength=strength,
            reflections=options.reflections,
            backend=backend,
            sketch_seed=sketch_seed,
        )
        R, residual, undetermined, angles = factors.R, factors.residual, factors.undetermined, factors.angles
        checks.append((residual <= LARGEST_RESIDUAL).all())
    else:
        factors = fk.average_factors(A, B, round.weights, backend=backend, sketch_seed=sketch_seed)
    checks.append(factors.finite)
    for (key_A, key_B), mean_A, mean_B in zip(layout.factor_keys, factors.A, factors.B, strict=True):
        mean[key_A] = mean_A if layout.has_matrices else mean_A.view(layout.specs[key_A].shape)
        mean[key_B] = mean_B if layout.has_matrices else mean_B.view(layout.specs[key_B].shape)
    sound = bool(torch.stack(checks).all())
    return Averages(mean, A, B, R, residual, sound, undetermined=undetermined, estimates=factors.estimates, angles=angles)


def stream_round(round: Round, prepare: Prepare) -> Averages:
    """Average what ``Method.prepare`` makes of every client, one after the other."""
    layout = round.layout
    mean = RunningMean(layout, round.clients[0].device)
    A: list[list[Tensor]] = [[] for _ in layout.adapters]
    B: list[list[Tensor]] = [[] for _ in layout.adapters]
    R: list[list[Tensor]] = [[] for _ in layout.adapters]
    undetermined: list[list[Tensor]] = [[] for _ in layout.adapters]
    places = {a.key_A: i for i, a in enumerate(layout.adapters)}
    for position, client, weight in zip(round.positions, round.clients, round.weights, strict=True):
        tensors, rotations = prepare(round.index, client, position, layout, round.reference)
        mean.add(tensors, weight, None if rotations is None else [found.R for found in rotations])
        for i, (key_A, key_B) in enumerate(layout.factor_keys):
            A[i].append(as_matrix(tensors[key_A]))
            B[i].append(as_matrix(tensors[key_B]))
        for group, per_group in zip(layout.groups, rotations or [], strict=rotations is not None):
            for a, per_adapter, left in zip(group.adapters, per_group.R, per_group.undetermined, strict=True):
                R[places[a.key_A]].append(per_adapter)
                undetermined[places[a.key_A]].append(left)
    state_dict = mean.state_dict()
    rotated = [torch.stack(per_client) for per_client in R] if R[0] else None
    counts = torch.tensor(undetermined, device="cpu") if R[0] else None
    idle = [client for client, weight in zip(round.clients, round.weights, strict=True) if not weight]
    finite = is_finite([*state_dict.values(), *(x for client in idle for x in client.values())])
    return Averages(state_dict, A, B, rotated, None, finite, undetermined=counts)
