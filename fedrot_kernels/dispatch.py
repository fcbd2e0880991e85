"""Aligning and averaging every adapter of a model at once: what is checked, and which backend does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from .checks import Clients, check_adapters, check_clients, normalised, numbers
from .precision import full_precision
from .torch_backend import whole_model as torch_backend

Backend = Literal["auto", "torch", "triton"]

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON_RANK = 128


@dataclass(frozen=True)
class Aligned:
    """Rotated averages of L adapters from N clients.

    Attributes:
        A: per adapter Ā = Σ wᵢ RᵢᵀAᵢ (r, d_in), the inputs' dtype, each with storage of its own (Triton: parts of one).
        B: per adapter B̄ = Σ wᵢ BᵢRᵢ (d_out, r), likewise.
        R: per adapter the rotations (N, r, r), float32 (float64 for float64 inputs).
        residual: (L, N), ‖RᵀR − I‖_max of every rotation; NaN where the cross-covariance was not finite.
        finite: a bool scalar tensor, on the inputs' device: every entry of every mean is finite.
    """

    A: list[Tensor]
    B: list[Tensor]
    R: list[Tensor]
    residual: Tensor
    finite: Tensor


@full_precision
def align_average(
    A: Sequence[Clients],
    B: Sequence[Clients],
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor] | None = None,
    B_ref: Sequence[Tensor] | None = None,
    strength: float = 1.0,
    special: bool = True,
    backend: Backend = "auto",
) -> Aligned:
    """Rotate every client's factors towards the reference's and average them, all adapters of a model at once.

    Ā = Σ wᵢ RᵢᵀAᵢ and B̄ = Σ wᵢ BᵢRᵢ with Rᵢ = soften(polar(Mᵢ), strength), where Mᵢ is AᵢA_refᵀ if only A_ref is given,
    BᵢᵀB_ref if only B_ref is, and AᵢA_refᵀ/‖A_ref‖² + BᵢᵀB_ref/‖B_ref‖² with both (a reference of zero counts as zero).
    Computed in float32 (float64 for float64), rounded once. Deterministic: the same inputs give the same bits.

    Args:
        A: per adapter (N, r, d_in), or a sequence of N tensors (r, d_in). Shapes and ranks may differ between adapters.
        B: per adapter (N, d_out, r), or a sequence of N tensors (d_out, r), of A's dtype.
        weights: (N,), non-negative and not all zero; only their ratios matter. On a GPU they are not checked.
        A_ref, B_ref: per adapter (r, d_in) and (d_out, r), any floating dtype; at least one of the two.
        strength: λ in [0, 1], see ``soften``.
        special: rotations in SO(r), see ``special_orthogonal``; else O(r).
        backend: "triton", "torch", or "auto": Triton for float16, bfloat16 and float32 of rank up to 128 on a GPU.

    Raises:
        ValueError: shapes or weights that do not fit, by the adapter's index.
        TypeError: tensors that are not floating-point.
    """
    n = check_adapters(A, B, A_ref, B_ref)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
    first = A[0][0]
    if _use_triton(backend, [of_clients[0] for of_clients in A], max(of_clients[0].shape[0] for of_clients in A)):
        from .triton_backend import align_average as triton

        return triton(
            A, B, normalised(weights, n, first.device).float(), A_ref=A_ref, B_ref=B_ref, strength=strength, special=special
        )
    shares = normalised(weights, n, first.device)
    return Aligned(*torch_backend.align_average(A, B, shares, A_ref, B_ref, strength, special))


@full_precision
def average(
    tensors: Sequence[Clients], weights: Sequence[float] | Tensor, *, backend: Backend = "auto"
) -> tuple[list[Tensor], Tensor]:
    """Weighted means over clients, of any tensors.

    Args:
        tensors: each (N, …), or a sequence of N tensors (…).
        weights, backend: as in ``align_average``.

    Returns:
        The means, in the inputs' dtypes, each with storage of its own (Triton: parts of one per dtype), summed in float32
        (float64 for float64) and rounded once; and a bool scalar tensor on their device: every entry is finite.

    Raises:
        ValueError: shapes or weights that do not fit, by the tensor's index.
        TypeError: tensors that are not floating-point.
    """
    n = len(tensors[0]) if len(tensors) else 0
    if not n:
        raise ValueError("nothing to average: pass at least one tensor of at least one client")
    for i, of_clients in enumerate(tensors):
        check_clients(of_clients, n, f"tensor {i}", tensors[0][0].device)
    first = tensors[0][0]
    if _use_triton(backend, [of_clients[0] for of_clients in tensors], 0):
        from .triton_backend import average as triton

        return triton(tensors, normalised(weights, n, first.device).float())
    return torch_backend.average(tensors, numbers(weights, n))


def runs_on_triton(x: Tensor, rank: int) -> bool:
    """Whether "auto" means Triton for a tensor of this rank."""
    fits = x.device.type == "cuda" and x.dtype in _TRITON_DTYPES and rank <= _TRITON_RANK
    return fits and find_spec("triton") is not None


def _use_triton(backend: str, samples: Sequence[Tensor], rank: int) -> bool:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be auto, torch or triton, got {backend!r}")
    fits = all(x.dtype in _TRITON_DTYPES for x in samples) and rank <= _TRITON_RANK
    if backend == "triton" and not fits:
        raise ValueError(f"the Triton kernels take float16, bfloat16 and float32 of rank up to {_TRITON_RANK}; use torch")
    if backend == "auto":
        return fits and samples[0].device.type == "cuda" and find_spec("triton") is not None
    return backend == "triton"
