"""Measuring an aggregation: errors and angles."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedrot_kernels import aggregation_error, full_precision, rotation_angle, widen

from ..adapters.layout import Layout
from ..methods.round import Averages
from .report import AdapterReport

_ENTRIES = 1 << 19  # of factors that are copied at a time to measure errors


@full_precision
def adapter_reports(
    layout: Layout, averages: Averages, shares: Sequence[float], with_error: bool
) -> tuple[AdapterReport, ...]:
    """Measure every adapter of an aggregation, some of equal shape at a time. One synchronisation with a device.

    Args:
        layout: the layout of the result.
        averages: the averages of the N clients.
        shares: the clients' weights, summing to 1.
        with_error: whether to measure the aggregation error and the update norm.
    """
    if averages.errors is not None or not averages.A:
        errors = averages.errors or [(None, None)] * len(layout.adapters)
        angles = [[0.0] * len(shares)] * len(errors)
        if averages.R is not None:
            angles = torch.stack([rotation_angle(R).double() for R in averages.R]).tolist()
        strengths: Sequence[float | None] = averages.strengths or [None] * len(errors)
        undetermined: Sequence[int | None] = [None] * len(errors)
        directions = undetermined
        if averages.undetermined is not None and averages.R is not None:
            undetermined = averages.undetermined.sum(1).tolist()
            directions = torch.stack([count_directions(R).sum() for R in averages.R]).tolist()
        rows_of = zip(layout.adapters, errors, angles, strengths, undetermined, directions, strict=True)
        return tuple(
            AdapterReport(a.module, a.rank, error, norm, tuple(per_client), strength, None, left, every)
            for a, (error, norm), per_client, strength, left, every in rows_of
        )
    device = averages.A[0][0].device
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, a in enumerate(layout.adapters):
        groups.setdefault((a.rank, a.d_in, a.d_out, a.dtype), []).append(i)
    indices: list[int] = []
    columns: list[Tensor] = []  # per adapter: error, norm, undetermined directions, all of them, the angle of every client
    w = torch.tensor(shares, dtype=torch.float64, device=device)
    for group in groups.values():
        a = layout.adapters[group[0]]
        size = max(1, _ENTRIES // (len(shares) * a.rank * (a.d_in + a.d_out))) if with_error else len(group)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            indices += part
            R = None if averages.R is None else torch.stack([averages.R[i] for i in part])
            values = torch.zeros(4 + len(shares), len(part), dtype=torch.float64, device=device)
            if R is not None:
                values[4:] = rotation_angle(R).T
                values[3] = count_directions(R).sum(1)
            if averages.undetermined is not None:
                values[2] = averages.undetermined[part].sum(1)
            if with_error:
                A, B = (_stacked([factors[i] for i in part]) for factors in (averages.A, averages.B))
                if R is not None:
                    A, B = R.mT @ A, B @ R
                values[0], values[1] = aggregation_error(A, B, w)
            columns.append(values)
    rows = torch.cat(columns, dim=1).T.tolist()
    reports = {}
    for i, (error, norm, count, every, *angles) in zip(indices, rows, strict=True):
        a = layout.adapters[i]
        measured = (error, norm) if with_error else (None, None)
        left, ranks = (None, None) if averages.undetermined is None else (int(count), int(every))
        reports[i] = AdapterReport(
            a.module, a.rank, measured[0], measured[1], tuple(angles), undetermined=left, directions=ranks
        )
    return tuple(reports[i] for i in range(len(layout.adapters)))


def count_directions(R: Tensor) -> Tensor:
    """The number of rows (...) of rotations (..., r, r) that are a client's own; those of padding are zero."""
    return R.any(-1).sum(-1)


def _stacked(part: Sequence[Sequence[Tensor]]) -> Tensor:
    """Stack one factor of G adapters from N clients, (G, N, …), in working precision."""
    S = torch.stack([x for per_client in part for x in per_client])
    return widen(S).view(len(part), -1, *S.shape[1:])
