"""The choice between PyTorch and the Triton kernels, and the functions on whole models that it serves."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from . import torch_backend
from .checks import check_adapters, check_clients, check_strength, firsts
from .native_backend.library import instruction_set
from .precision import full_precision
from .sketch import estimate_errors
from .tolerances import LARGEST_TRITON_RANK
from .types import Aligned, Averaged, Backend, Clients, Factors

_kind = attrgetter("dtype", "device")
_COMPILED_DTYPES = {torch.float16, torch.bfloat16, torch.float32}


@full_precision
def align_average(
    A: Factors,
    B: Factors,
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor] | None = None,
    B_ref: Sequence[Tensor] | None = None,
    strength: float = 1.0,
    reflections: bool = False,
    backend: Backend = "auto",
    sketch_seed: int | None = None,
) -> Aligned:
    """Rotate every client's factors towards the reference's and average them, all adapters of a model at once.

    Ā = Σ wᵢ RᵢᵀAᵢ and B̄ = Σ wᵢ BᵢRᵢ with Rᵢ = soften(polar(Mᵢ), strength), where Mᵢ is AᵢA_refᵀ if only A_ref is given,
    BᵢᵀB_ref if only B_ref is, and AᵢA_refᵀ/‖A_ref‖² + BᵢᵀB_ref/‖B_ref‖² with both (the term of a zero reference is zero).
    Computed in float32 (float64 for float64) and rounded once. Deterministic: the same inputs give the same bits.

    Args:
        A: per adapter (N, r, d_in), or a sequence of N tensors (r, d_in). Shapes and ranks may differ between adapters.
        B: per adapter (N, d_out, r), or a sequence of N tensors (d_out, r), of A's dtype.
        weights: (N,), non-negative and not all zero; only their ratios matter. On a GPU they are not checked.
        A_ref: per adapter (r, d_in), any floating dtype; None to align B alone.
        B_ref: per adapter (d_out, r), any floating dtype; None to align A alone.
        strength: λ in [0, 1], see ``soften``.
        reflections: False for rotations, SO(r), see ``special_orthogonal``; True for O(r).
        backend: "triton", "native", "torch", or "auto": for float16, bfloat16 and float32 of rank up to 128 Triton on a GPU
            and the compiled library, if it was built, on a CPU.
        sketch_seed: the seed of the sketches that estimate errors; None for no estimates. On a GPU they wait for the device.

    Raises:
        ValueError: shapes or weights that do not fit, by the adapter's index.
        TypeError: tensors that are not floating-point.
    """
    if A_ref is None and B_ref is None:
        raise ValueError("pass A_ref, B_ref or both: what to align to")
    check_adapters(A, B, A_ref, B_ref)
    check_strength(strength)
    samples, rank = firsts(A), max(x.shape[0] for x in firsts(A))
    options: Any = {"A_ref": A_ref, "B_ref": B_ref, "strength": strength, "reflections": reflections}
    if use_native(backend, samples, rank):
        from .native_backend.whole_model import align_average as native  # not at the top: it imports the torch backend

        return native(A, B, weights, **options, sketch_seed=sketch_seed)
    found = _implementation(backend, samples, rank).align_average(A, B, weights, **options)
    if sketch_seed is None:
        return found
    return replace(found, estimates=estimate_errors(A, B, found.R, weights, found.A, found.B, sketch_seed))


@full_precision
def average_factors(
    A: Factors,
    B: Factors,
    weights: Sequence[float] | Tensor,
    *,
    backend: Backend = "auto",
    sketch_seed: int | None = None,
) -> Averaged:
    """Average every client's factors as they are, all adapters of a model at once: Ā = Σ wᵢAᵢ and B̄ = Σ wᵢBᵢ.

    Args:
        A, B, weights, backend, sketch_seed: as in ``align_average``.

    Raises:
        ValueError: shapes or weights that do not fit, by the adapter's index.
        TypeError: tensors that are not floating-point.
    """
    check_adapters(A, B, None, None)
    samples, rank = firsts(A), max(x.shape[0] for x in firsts(A))
    if use_native(backend, samples, rank):
        from .native_backend.whole_model import align_average as native

        options: Any = {"A_ref": None, "B_ref": None, "strength": 0.0, "reflections": False}
        found = native(A, B, weights, **options, sketch_seed=sketch_seed)
        return Averaged(found.A, found.B, found.finite, found.estimates)
    means, finite = _implementation(backend, samples, rank).average([*A, *B], weights)
    mean_A, mean_B = means[: len(A)], means[len(A) :]
    if sketch_seed is None:
        return Averaged(mean_A, mean_B, finite)
    return Averaged(mean_A, mean_B, finite, estimate_errors(A, B, None, weights, mean_A, mean_B, sketch_seed))


@full_precision
def average(
    tensors: Sequence[Clients], weights: Sequence[float] | Tensor, *, backend: Backend = "auto"
) -> tuple[list[Tensor], Tensor]:
    """Weighted means over clients, of any tensors.

    Args:
        tensors: each (N, …), or a sequence of N tensors (…).
        weights: as in ``align_average``.
        backend: as in ``align_average``.

    Returns:
        The means, in the inputs' dtypes, summed in float32 (float64 for float64) and rounded once; and a bool scalar tensor
        on their device: every entry of every mean is finite. PyTorch gives each mean storage of its own; the Triton means
        of one dtype share one storage.

    Raises:
        ValueError: shapes or weights that do not fit, by the tensor's index.
        TypeError: tensors that are not floating-point.
    """
    n = len(tensors[0]) if len(tensors) else 0
    if not n:
        raise ValueError("nothing to average: pass at least one tensor of at least one client")
    for i, clients in enumerate(tensors):
        check_clients(clients, n, f"tensor {i}", tensors[0][0].device)
    return _implementation(backend, [clients[0] for clients in tensors], rank=0).average(tensors, weights)


def use_triton(backend: Backend, samples: Sequence[Tensor], rank: int) -> bool:
    """Whether the Triton kernels compute.

    Args:
        backend: the caller's choice.
        samples: a tensor of every dtype among the inputs, all on one device.
        rank: the largest rank among the inputs.

    Raises:
        ValueError: a backend that does not exist, or "triton" for inputs that its kernels do not take.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be auto, native, torch or triton, got {backend!r}")
    fits = are_compiled([dtype for dtype, _ in {*map(_kind, samples)}], rank)
    if backend == "triton" and not fits:
        raise ValueError(
            f"the Triton kernels take float16, bfloat16 and float32 of rank up to {LARGEST_TRITON_RANK}; use torch"
        )
    if backend == "auto":
        return fits and samples[0].device.type == "cuda" and find_spec("triton") is not None
    return backend == "triton"


def use_native(backend: Backend, samples: Sequence[Tensor], rank: int) -> bool:
    """Whether the compiled library is to be used, for tensors of these dtypes and devices, and of at most this rank.

    Raises:
        ValueError: "native" for inputs that the library does not take, or where it was not built.
    """
    kinds = {*map(_kind, samples)}
    fits = are_compiled([dtype for dtype, _ in kinds], rank) and all(device.type == "cpu" for _, device in kinds)
    if backend == "native" and instruction_set() is None:
        raise ValueError("the compiled library is not there: install fedrot where there is a C++ compiler; or use torch")
    if backend == "native" and not fits:
        raise ValueError(
            "the compiled library takes float16, bfloat16 and float32 tensors on a CPU, of rank up to "
            f"{LARGEST_TRITON_RANK}; use torch"
        )
    return fits and backend in ("auto", "native") and instruction_set() is not None


def backends() -> dict[str, str]:
    """What this installation has of every backend: name → a few words."""
    triton = "on a GPU" if torch.cuda.is_available() else "no GPU"
    return {
        "native": instruction_set() or "not built, or switched off",
        "torch": torch.__version__,
        "triton": triton if find_spec("triton") is not None else "not installed",
    }


def are_compiled(dtypes: Iterable[torch.dtype], rank: int) -> bool:
    """Whether there are compiled kernels for tensors of these dtypes and this rank."""
    return {*dtypes} <= _COMPILED_DTYPES and rank <= LARGEST_TRITON_RANK


class _Implementation(Protocol):
    """The functions of a backend. Their arguments are checked, except for the weights, which backends read unlike."""

    def align_average(
        self,
        A: Factors,
        B: Factors,
        weights: Sequence[float] | Tensor,
        *,
        A_ref: Sequence[Tensor] | None,
        B_ref: Sequence[Tensor] | None,
        strength: float,
        reflections: bool,
    ) -> Aligned: ...

    def average(self, tensors: Sequence[Clients], weights: Sequence[float] | Tensor) -> tuple[list[Tensor], Tensor]: ...


def _implementation(backend: Backend, samples: Sequence[Tensor], rank: int) -> _Implementation:
    if not use_triton(backend, samples, rank):
        return torch_backend
    from . import triton_backend  # not at the top: Triton is not there on every system

    return triton_backend
