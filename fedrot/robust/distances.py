"""Distances between the clients of a round, over the whole model: LoRA updates s·B·A, and everything else as it is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedrot_kernels import Backend, squared_distances, squared_distances_plain

from ..adapters.checks import own_scalings
from ..adapters.columns import client_factors, matrices
from ..adapters.layout import Layout
from ..adapters.update import StateDict, Update
from ..errors import UpdateError
from ..ranks.prepare import PreparedRound
from .rules import usual_square


@dataclass(frozen=True)
class Distances:
    """Squared distances of N clients, float64 on the CPU.

    Attributes:
        squares: (N, N), ‖ΔWᵢ − ΔWⱼ‖² over all adapters, plus ``other_weight`` times that of all other tensors.
        changes: (N,), the squared distance of every client to what it started from; None unless asked for.
        other_weight: what squares of other tensors (heads, biases, magnitudes) count, at most 1.
    """

    squares: Tensor
    changes: Tensor | None
    other_weight: float

    @property
    def finite(self) -> bool:
        """Whether all are finite."""
        known = [self.squares] if self.changes is None else [self.squares, self.changes]
        return all(bool(x.isfinite().all()) for x in known)


def measure_distances(prepared: PreparedRound, *, changes: bool, backend: Backend = "auto") -> Distances:
    """Measure the distances of a round's clients. One synchronisation with a device.

    Tensors that are no LoRA factor enter as they are, unless their usual distance (the median of clients' medians) is larger
    than that of the LoRA updates: then they are scaled down to it, so that heads alone do not decide.

    Args:
        prepared: the round.
        changes: whether to measure what each client changed: its distance to the reference or, without one, to a zero
            update, in which other tensors have no part.
        backend: "torch" keeps the compiled library off.

    Raises:
        UpdateError: changes of a tensor that the reference lacks.
    """
    layout, clients, n = prepared.layout, prepared.clients, len(prepared.clients)
    start = prepared.reference if changes else None
    lora = adapter_squares(prepared, changes=changes, backend=backend).sum(0)
    with_start = [*clients, start] if start is not None else clients
    if start is not None:
        _check_start(start, layout)
    others = other_squares(layout, with_start).to(lora.device)
    both = torch.zeros(2, n + changes, n + changes, dtype=torch.float64, device=lora.device)
    both[0] = lora
    both[1, : len(with_start), : len(with_start)] = others
    lora, others = both.cpu()
    usual, usual_others = usual_square(lora[:n, :n]), usual_square(others[:n, :n])
    weight = min(1.0, usual / usual_others) if usual > 0 and usual_others > 0 else 1.0
    squares = lora + weight * others
    return Distances(squares[:n, :n], squares[:n, n] if changes else None, weight)


def _check_start(start: Update, layout: Layout) -> None:
    for key in layout.other_keys:
        if key not in start or start.specs[key].shape != layout.specs[key].shape:
            raise UpdateError(
                f"{start.name} has no {key} {layout.specs[key].shape}, whose change clip= bounds as well; pass the whole "
                "adapter that the clients started from"
            )


def adapter_squares(prepared: PreparedRound, *, changes: bool, backend: Backend = "auto") -> Tensor:
    """Squared distances of the updates s·B·A, (L, N, N), on the clients' device; with changes, those to the start come last.

    Args:
        prepared: the round.
        changes: whether what clients started from stands at the end as one more client.
        backend: as in ``measure_distances``.
    """
    layout, s = prepared.layout, prepared.scalings
    common = _common_scalings(prepared)
    A, B = client_factors(layout, prepared.clients)
    scales = None
    if s is not None and prepared.unequal_ranks == "stack":
        scales = [[own[a.module] / common[a.module] for own in s.per_client] for a in layout.adapters]
    if changes:
        starts = [_start(prepared.reference, a.key_A, a.key_B, A[i][0], B[i][0]) for i, a in enumerate(layout.adapters)]
        A = [[*clients, of_A] for clients, (of_A, _) in zip(A, starts, strict=True)]
        B = [[*clients, of_B] for clients, (_, of_B) in zip(B, starts, strict=True)]
        if scales is not None:
            known = prepared.reference is not None and prepared.reference.config is not None
            own = own_scalings(prepared.reference, layout) if known and prepared.reference is not None else common
            scales = [[*row, own[a.module] / common[a.module]] for row, a in zip(scales, layout.adapters, strict=True)]
    squares = squared_distances(A, B, scales, backend="torch" if backend == "torch" else "auto")
    factor = torch.tensor([common[a.module] ** 2 for a in layout.adapters], dtype=torch.float64, device="cpu")
    return squares * factor.to(squares.device)[:, None, None]


def other_squares(layout: Layout, clients: Sequence[StateDict]) -> Tensor:
    """Squared distances (N, N) of all tensors that are no LoRA factor: heads, biases, DoRA's magnitudes."""
    if not layout.other_keys:
        return torch.zeros(len(clients), len(clients), dtype=torch.float64, device="cpu")
    device = clients[0][layout.other_keys[0]].device
    return squared_distances_plain([[c[key].to(device) for c in clients] for key in layout.other_keys]).sum(0)


def _start(reference: Update | None, key_A: str, key_B: str, like_A: Tensor, like_B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors that clients started from: the reference's, or the update zero."""
    if reference is None:
        return torch.zeros_like(like_A), torch.zeros_like(like_B)
    A, B = matrices([reference[key_A], reference[key_B]])
    return A.to(like_A.device), B.to(like_B.device)


def _common_scalings(prepared: PreparedRound) -> dict[str, float]:
    """module → s that all clients have, or the result's where they differ; 1 where no configuration is known."""
    layout, reference = prepared.layout, prepared.reference
    if prepared.scalings is not None:
        return prepared.scalings.result
    first = prepared.given[0]
    config = first.config or (reference.config if reference is not None else None)
    if config is None:
        return {a.module: 1.0 for a in layout.adapters}
    return own_scalings(replace(first, specs=layout.specs, config=config), layout)
