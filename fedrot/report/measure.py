"""Measuring an aggregation: errors and angles."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot_kernels import Backend, Estimates, estimate_errors, full_precision, measure_errors, rotation_angle
from fedrot_kernels.grouping import group_indices
from fedrot_kernels.sketch import sum_and_deviation

from ..adapters.layout import Layout
from ..methods.round import Averages
from ..options import AggregationOptions
from .report import AdapterReport

Doubles = NDArray[np.float64]


class Errors(NamedTuple):
    """What a report says of one adapter's errors; see ``AdapterReport``."""

    error: float | None = None
    update_norm: float | None = None
    plain_error: float | None = None
    deviations: tuple[float, float] | None = None


@full_precision
def adapter_reports(
    layout: Layout, averages: Averages, shares: Sequence[float], options: AggregationOptions
) -> tuple[tuple[AdapterReport, ...], float | None]:
    """Measure every adapter of an aggregation.

    Args:
        layout: the layout of the result.
        averages: the averages of the N clients.
        shares: the clients' weights, summing to 1.
        options: whether errors are measured, estimated (by the seed) or left out.

    Returns:
        The reports, and the standard deviation of the whole model's error, None where it is not estimated.
    """
    L, deviation = len(layout.adapters), None
    angles, rows_of_R = _turns(averages, L, len(shares))
    if averages.errors is not None:
        errors = [Errors(*values) for values in averages.errors]
    elif not options.report_error or not averages.A:
        errors = [Errors()] * L
    elif options.report_error == "estimate":
        estimates = averages.estimates or _estimate(layout, averages, shares, options.seed)
        errors, deviation = read_estimates(estimates)
    else:
        backend: Backend = "torch" if options.backend == "torch" else "auto"  # the others do not measure every dtype
        found = measure_errors(averages.A, averages.B, averages.R, shares, backend=backend)
        errors = [Errors(*values) for values in found.tolist()]
    undetermined: Sequence[int | None] = [None] * L
    directions = undetermined
    if averages.undetermined is not None and averages.R is not None:
        undetermined = averages.undetermined.sum(1).tolist()
        directions = rows_of_R
    strengths: Sequence[float | None] = averages.strengths or [None] * L
    ranks = averages.ranks or [a.rank for a in layout.adapters]
    rows = zip(layout.adapters, ranks, errors, angles, strengths, undetermined, directions, strict=True)
    reports = tuple(
        AdapterReport(a.module, rank, of.error, of.update_norm, turned, strength, of.deviations, left, every, of.plain_error)
        for a, rank, of, turned, strength, left, every in rows
    )
    return reports, deviation


def read_estimates(estimates: Estimates) -> tuple[list[Errors], float]:
    """The errors of every adapter, and the standard deviation of the whole model's error."""
    lost, lost_deviation, plain, plain_deviation, added, added_deviation, mean = estimates.numbers.numpy().T
    squares, deviations = (lost, mean + added, plain), (lost_deviation, added_deviation, plain_deviation)
    roots = (x.tolist() for x in _root(np.stack(squares, 1), np.stack(deviations, 1)))
    errors = [Errors(error, norm, other, (e, n)) for (error, norm, other), (e, n, _) in zip(*roots, strict=True)]
    return errors, float(_root(*(x.numpy() for x in sum_and_deviation(estimates.squares)))[1])


def _root(square: Doubles, deviation: Doubles) -> tuple[Doubles, Doubles]:
    """The roots of estimates, which may be negative, and the roots' standard deviations; NaN stays NaN.

    In NumPy, because PyTorch's roots of a few hundred values wake all its threads, which then wait for more on the cores
    that the compiled library works on.
    """
    found = np.sqrt(np.maximum(square, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return found, np.where(square <= 0, np.sqrt(deviation), deviation / (2 * found))


def count_directions(R: Tensor) -> Tensor:
    """The number of rows (...) of rotations (..., r, r) that are a client's own; those of padding are zero."""
    return R.any(-1).sum(-1)


def _turns(averages: Averages, L: int, n: int) -> tuple[list[tuple[float, ...]], list[int]]:
    """The rotation angles of the n clients in degrees, and the number of directions of all, of each of L adapters."""
    angles: list[tuple[float, ...]] = [(0.0,) * n] * L
    directions = [0] * L
    if averages.angles is not None and averages.R is not None:
        return list(map(tuple, averages.angles.tolist())), [n * R.shape[-1] for R in averages.R]
    if averages.R is not None:
        for group in group_indices(R.shape for R in averages.R):
            R = torch.stack([averages.R[i] for i in group])
            of_group = zip(group, rotation_angle(R).tolist(), count_directions(R).sum(1).tolist(), strict=True)
            for i, per_client, count in of_group:
                angles[i], directions[i] = tuple(per_client), count
    return angles, directions


def _estimate(layout: Layout, averages: Averages, shares: Sequence[float], seed: int) -> Estimates:
    """Estimate errors of averages that the kernels did not make."""
    mean_A, mean_B = ([averages.mean[key].flatten(1) for key in keys] for keys in zip(*layout.factor_keys, strict=True))
    return estimate_errors(averages.A, averages.B, averages.R, shares, mean_A, mean_B, seed)
