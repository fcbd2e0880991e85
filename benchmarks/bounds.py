"""Times that were measured beside the bounds in ``results/roofline.json``."""

from collections.abc import Sequence
from typing import Any

from .record import RESULTS

BOUNDS = RESULTS / "roofline.json"
Row = dict[str, Any]


def card_of(device: str, cards: Sequence[str]) -> str:
    """The card whose bounds a device is held to: its own, or the first of the record."""
    return next((card for card in cards if card in device), cards[0])


def beside(case: Row, seconds: Sequence[float], card: str) -> list[Row]:
    """A row per kernel: the time measured, its bound, and their quotient, which is below 1 where the bound is wrong."""
    rows = []
    for kernel, measured in zip(case["kernels"], seconds, strict=True):
        row = {key: case[key] for key in ("dtype", "rank", "d", "clients")} | {"kernel": kernel["kernel"]}
        bound = kernel["by_card"][card]
        row |= {"measured_us": measured * 1e6, "bound_us": bound["bound_us"], "bound_by": bound["bound_by"], "card": card}
        rows.append(row | {"measured_over_bound": row["measured_us"] / row["bound_us"]})
    return rows


def lines(rows: Sequence[Row]) -> list[str]:
    """What a person reads of the rows, the furthest from their bounds first."""
    return [
        f"{r['kernel']}, {r['dtype']} r {r['rank']} d {r['d']} N {r['clients']}: {r['measured_us']:.1f} µs, "
        f"{r['measured_over_bound']:.2f} × the {r['card']}'s {r['bound_us']:.1f} µs ({r['bound_by']})"
        + (": the bound is wrong" if r["measured_over_bound"] < 1 else "")
        for r in sorted(rows, key=lambda r: -r["measured_over_bound"])
    ]
