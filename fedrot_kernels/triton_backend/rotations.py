"""Launching the polar kernels: the one for small ranks in registers, the one for large ranks on scratch memory."""

import torch
import triton
from torch import Tensor

from ..schedule import PERTURB_AT, SCHEDULE
from ..tolerances import COMPLETION_SHIFT
from ..types import Rotations
from . import polar, polar_blocked
from .launch import LaunchOptions, current_backend, interpreted, on_device_of
from .tables import schedule_table

_STEPS = len(SCHEDULE)


def options(RP: int, backend: str) -> LaunchOptions:
    """How to launch, for any padded rank."""
    if RP <= 32:
        return polar.options(RP, _STEPS, PERTURB_AT, backend)
    return polar_blocked.options(RP, _STEPS, PERTURB_AT, backend)


def rotations(
    M: Tensor,
    adapters: Tensor,
    *,
    RP: int,
    leading: int,
    n_clients: int,
    joint: bool,
    strength: float,
    reflections: bool,
    floor: float,
) -> Rotations:
    """Compute R of L adapters and N clients, from sums of slices of M.

    Args:
        M: (slices, rows, leading, leading) float32, rows ≥ N; row N is the reference's own where joint.
        adapters: (L, 5) int32, see ``ModelTables``.
        RP: the padded rank.
        leading: the leading dimension of the matrices.
        n_clients: N.
        joint: whether M is the sum of both factors' cross-covariances, each relative to its reference's norm.
        strength: as in ``ops.procrustes``.
        reflections: as in ``ops.procrustes``.
        floor: as in ``ops.procrustes``.

    Returns:
        R (L, N, leading, leading), of which rows and columns beyond an adapter's rank are undefined; ‖RᵀR − I‖_max (L, N),
        NaN where M is not finite; and the number of directions in which M is below the floor, (L, N).
    """
    L, device = len(adapters), M.device
    n = L * n_clients
    R = torch.empty(L, n_clients, leading, leading, dtype=torch.float32, device=device)
    residual = torch.empty(L, n_clients, dtype=torch.float32, device=device)
    undetermined = torch.empty(L, n_clients, dtype=torch.int64, device=device)
    schedule = schedule_table(device)
    launch = options(RP, current_backend())
    counts = (n, n_clients, M.shape[1], leading, int(joint), int(reflections))
    scalars = (float(floor), COMPLETION_SHIFT, float(strength))
    outputs = (R, residual, undetermined)
    with on_device_of(M):
        if RP <= 32:
            grid = (triton.cdiv(n, launch.constants["SIZE"] // RP),)
            polar.polar_kernel[grid](M, *outputs, adapters, schedule, *counts, *scalars, **launch.arguments())
        else:
            programs = min(n, _resident_programs(device))
            scratch = torch.empty(programs, polar_blocked.BUFFERS, RP, RP, dtype=torch.float32, device=device)
            polar_blocked.polar_blocked_kernel[(programs,)](
                M, *outputs, adapters, schedule, scratch, *counts, *scalars, **launch.arguments()
            )
    return Rotations(*outputs)


def _resident_programs(device: torch.device) -> int:
    """One program per multiprocessor: an H200's L2 cache holds that many scratches of 384 KiB, at rank 128."""
    return 2 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count
