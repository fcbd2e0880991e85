"""One workload, all candidates side by side: the numbers of one table."""

from typing import Any

import torch

from .candidates import COPY, DICTIONARY_LOOP, PUBLISHED, candidates
from .graphs import captured
from .limits import limits
from .memory import peak_above
from .timing import side_by_side
from .workloads import Workload, build


def compare(
    workload: Workload,
    device: torch.device,
    dtype: torch.dtype,
    strength: float,
    budget: float,
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Measure every candidate on a workload.

    Args:
        strength: λ of everything that aligns.
        budget: seconds per candidate.
        without: names of candidates to leave out.

    Returns:
        The configuration and per row the times, ratios of medians, bandwidth and peak memory, for tables and records.
    """
    inputs = build(workload, device, dtype)
    rows = {name: row for name, row in candidates(inputs, strength).items() if name not in without}
    calls = {name: row.call for name, row in rows.items()}
    not_captured = {}
    if device.type == "cuda":
        for name, row in list(rows.items()):
            if not row.captures:
                continue
            try:
                replay = captured(row.call)
            except Exception as error:  # a result too: the rest is still worth measuring
                not_captured[name] = f"{type(error).__name__}: {error}"
                continue
            calls[f"{name}, CUDA graph"], rows[f"{name}, CUDA graph"] = replay, row
    timings = side_by_side(calls, device, budget, f"{workload.label} {str(dtype)[6:]}")
    copy_bandwidth = rows[COPY].moved / timings[COPY].median
    table = {}
    for name, timing in timings.items():
        bandwidth = rows[name].moved / timing.median
        table[name] = {
            **timing.record(),
            "aligns": rows[name].aligns,
            "moved_bytes": rows[name].moved,
            "bytes_per_s": bandwidth,
            "share_of_copy": bandwidth / copy_bandwidth,
            "times_faster_than_published": timings[PUBLISHED].time / timing.time if PUBLISHED in timings else None,
            "ratio_to_dictionary_loop": timing.time / timings[DICTIONARY_LOOP].time,
            "peak_bytes_above_inputs": None if name == COPY else peak_above(calls[name], device),
        }
    return {
        "workload": workload.label,
        "model": workload.model,
        "adapters": len(workload.adapters),
        "rank": workload.rank,
        "clients": workload.clients,
        "dtype": str(dtype)[6:],
        "strength": strength,
        "input_bytes": (workload.clients + 1) * workload.update_bytes(dtype),
        "output_bytes": workload.update_bytes(dtype),
        "limits": limits(workload, dtype, device) if device.type == "cpu" else None,
        "rows": table,
        "not_captured": not_captured,
    }
