"""The tensor-level operations, registered with ``torch.library``: Triton on a GPU, PyTorch elsewhere, opaque to compilers.

None is differentiated through. float64, and ranks over 128, are computed by PyTorch on a GPU too.
"""

import torch
from torch import Tensor

from .dispatch import runs_on_triton
from .torch_backend import procrustes as batched


@torch.library.custom_op("fedrot::cross_covariance", mutates_args=())
def _cross_covariance(F: Tensor, F_ref: Tensor) -> Tensor:
    if runs_on_triton(F, F.shape[-2]) and F_ref.dtype != torch.float64 and F.shape[-F_ref.dim() :] == F_ref.shape:
        from .triton_backend.batches import cross_covariance

        return cross_covariance(F, F_ref)
    return batched.cross_covariance(F, F_ref)


@_cross_covariance.register_fake
def _(F: Tensor, F_ref: Tensor) -> Tensor:
    batch, r = torch.broadcast_shapes(F.shape[:-2], F_ref.shape[:-2]), F.shape[-2]
    return F.new_empty((*batch, r, r), dtype=batched.working_dtype(F, F_ref))


@torch.library.custom_op("fedrot::procrustes", mutates_args=())
def _procrustes(M: Tensor, strength: float, special: bool, noise: float) -> tuple[Tensor, Tensor]:
    if runs_on_triton(M, M.shape[-1]) and M.numel():
        from .triton_backend.batches import procrustes

        return procrustes(M, strength, special, noise)
    return batched.procrustes(M, strength=strength, special=special, noise=noise)


@_procrustes.register_fake
def _(M: Tensor, strength: float, special: bool, noise: float) -> tuple[Tensor, Tensor]:
    dtype = batched.working_dtype(M)
    return M.new_empty(M.shape, dtype=dtype), M.new_empty(M.shape[:-2], dtype=dtype)


@torch.library.custom_op("fedrot::rotate_average", mutates_args=())
def _rotate_average(F: Tensor, R: Tensor | None, weights: Tensor) -> Tensor:
    if weights.device.type == "cpu":
        batched.check_weights(weights)
    if R is not None and runs_on_triton(F, F.shape[-2]) and R.dtype != torch.float64:
        from .triton_backend.batches import rotate_average

        return rotate_average(F, R, weights)
    return batched.rotate_average(F, R, weights)


@_rotate_average.register_fake
def _(F: Tensor, R: Tensor | None, weights: Tensor) -> Tensor:
    return F.new_empty(F.shape[1:], dtype=batched.working_dtype(F))


def cross_covariance(F: Tensor, F_ref: Tensor) -> Tensor:
    """M = F F_refᵀ: how a client's frame lies relative to the reference.

    Args:
        F: (..., r, d), the clients' frames: A, or B.mT.
        F_ref: (..., r, d), the reference frames, broadcast against F.

    Returns:
        (..., r, r), float32 (float64 if an input is).

    Raises:
        ValueError: shapes that do not fit.
    """
    batched.check_frames(F, F_ref)
    return _cross_covariance(F.detach(), F_ref.detach())


def polar(M: Tensor, *, noise: float = 0.0) -> Tensor:
    """The orthogonal polar factor R of M = R H, by Newton-Schulz: it maximises tr(RᵀM), so ‖RᵀF − F_ref‖_F is least.

    Args:
        M: (..., r, r), any floating dtype, any scale. Directions in which M is zero do not rotate: polar(0) = I.
        noise: the size of M's own error relative to ‖M‖_F. Directions in which M is smaller do not rotate either; in a
            computed product of low rank they would otherwise rotate as its rounding happens to fall.

    Returns:
        (..., r, r), float32 (float64 for float64), ‖RᵀR − I‖_max ≤ 1e-6 (1e-12). A matrix holding NaN or Inf gives NaN
        and leaves its neighbours as they would be without it.

    Raises:
        ValueError: not square.
        TypeError: not floating-point.
    """
    return procrustes(M, noise=noise)[0]


def procrustes(M: Tensor, *, strength: float = 1.0, special: bool = False, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """The rotation of a cross-covariance, and how far from orthogonal it is.

    Args:
        M: (..., r, r), any floating dtype.
        strength: λ of ``soften``.
        special: SO(r), as ``special_orthogonal``; else O(r).
        noise: as in ``polar``.

    Returns:
        R (..., r, r) and ‖RᵀR − I‖_max (...), both float32 (float64 for float64); NaN where M is not finite.

    Raises:
        ValueError: not square, or a strength outside [0, 1].
        TypeError: not floating-point.
    """
    batched.check_square(M=M)
    batched.check_strength(strength)
    batched.working_dtype(M)
    return _procrustes(M.detach(), float(strength), special, float(noise))


def rotate_average(F: Tensor, R: Tensor | None, weights: Tensor) -> Tensor:
    """F̄ = Σ wᵢ RᵢᵀFᵢ, the weights normalised to Σ wᵢ = 1, accumulated in float32 client by client.

    Args:
        F: (N, ..., r, d), any floating dtype.
        R: (N, ..., r, r), or None for the plain weighted mean.
        weights: (N,), non-negative, not all zero; not checked on a GPU.

    Returns:
        (..., r, d), float32 (float64 if F is).

    Raises:
        ValueError: shapes or weights that do not fit.
    """
    if weights.shape != F.shape[:1]:
        raise ValueError(f"expected one weight per client, got weights {tuple(weights.shape)} and F {tuple(F.shape)}")
    return _rotate_average(F.detach(), None if R is None else R.detach(), weights.detach())
