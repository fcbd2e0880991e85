"""The tensor-level operations, registered with ``torch.library``: opaque to compilers, not differentiated through.

Each runs on the Triton kernels where ``dispatch.use_triton`` allows, in PyTorch elsewhere: on a CPU, for float64, and for
ranks over 128.
"""

import torch
from torch import Tensor

from .checks import check_frames, check_square, check_strength, read_weights
from .dispatch import use_triton
from .precision import working_dtype
from .torch_backend import procrustes as torch_procrustes
from .torch_backend import products as torch_products
from .types import Rotations


@torch.library.custom_op("fedrot::cross_covariance", mutates_args=())
def _cross_covariance(F: Tensor, F_ref: Tensor) -> Tensor:
    if use_triton("auto", [F, F_ref], F.shape[-2]) and F.shape[-F_ref.dim() :] == F_ref.shape:
        from .triton_backend.batches import cross_covariance

        return cross_covariance(F, F_ref)
    return torch_products.cross_covariance(F, F_ref)


@_cross_covariance.register_fake
def _(F: Tensor, F_ref: Tensor) -> Tensor:
    batch: torch.Size = torch.broadcast_shapes(F.shape[:-2], F_ref.shape[:-2])
    return F.new_empty((*batch, F.shape[-2], F.shape[-2]), dtype=working_dtype(F, F_ref))


@torch.library.custom_op("fedrot::procrustes", mutates_args=())
def _procrustes(M: Tensor, strength: float, reflections: bool, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    if use_triton("auto", [M], M.shape[-1]) and M.numel():
        from .triton_backend.batches import procrustes

        return procrustes(M, strength=strength, reflections=reflections, floor=floor)
    R, residual, undetermined = torch_procrustes.rotations(M, strength=strength, reflections=reflections, floor=floor)
    return R, residual, undetermined


@_procrustes.register_fake
def _(M: Tensor, strength: float, reflections: bool, floor: float) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    dtype, batch = working_dtype(M), M.shape[:-2]
    return M.new_empty(M.shape, dtype=dtype), M.new_empty(batch, dtype=dtype), M.new_empty(batch, dtype=torch.int64)


@torch.library.custom_op("fedrot::rotate_average", mutates_args=())
def _rotate_average(F: Tensor, R: Tensor | None, weights: Tensor) -> Tensor:
    if weights.device.type == "cpu":
        read_weights(weights, len(weights))
    if R is not None and use_triton("auto", [F, R], F.shape[-2]):
        from .triton_backend.batches import rotate_average

        return rotate_average(F, R, weights)
    return torch_products.rotate_average(F, R, weights)


@_rotate_average.register_fake
def _(F: Tensor, R: Tensor | None, weights: Tensor) -> Tensor:  # noqa: ARG001
    return F.new_empty(F.shape[1:], dtype=working_dtype(F))


def cross_covariance(F: Tensor, F_ref: Tensor) -> Tensor:
    """Compute M = F F_refᵀ, which measures how a client's frame lies relative to the reference.

    Args:
        F: (..., r, d), the clients' frames: A, or B.mT.
        F_ref: (..., r, d), the reference frames, broadcast against F.

    Returns:
        (..., r, r), float32 (float64 if an input is).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: not floating-point.
    """
    check_frames(F, F_ref)
    M: Tensor = _cross_covariance(F.detach(), F_ref.detach())
    return M


def polar(M: Tensor, *, floor: float = 0.0) -> Tensor:
    """The orthogonal polar factor R of M = R H, reflections included.

    It maximises tr(RᵀM) over O(r), so that ‖RᵀF − F_ref‖_F is least for M = F F_refᵀ.

    Args:
        M: (..., r, r), any floating dtype, any scale. Directions in which M is zero do not rotate: polar(0) = I.
        floor: the size of M's own error relative to ‖M‖_F. Directions in which M is smaller do not rotate either. In a
            computed product of low rank, they would otherwise rotate as its rounding happens to fall.

    Returns:
        (..., r, r), float32 (float64 for float64), ‖RᵀR − I‖_max ≤ 1e-6 (1e-12). A matrix holding NaN or Inf gives NaN
        and does not change the results of the others.

    Raises:
        ValueError: not square.
        TypeError: not floating-point.
    """
    return procrustes(M, reflections=True, floor=floor)[0]


def procrustes(M: Tensor, *, strength: float = 1.0, reflections: bool = False, floor: float = 0.0) -> Rotations:
    """Compute the rotation of a cross-covariance, how far from orthogonal it is, and how much of it is undetermined.

    On a CPU, R is the exact one of M to the rounding of the result, if no singular value is below the floor. In the Triton
    kernels at λ = 1 it is within max(floor/2, 4 eps) ‖M‖_F over the sum of M's two smallest singular values; where det < 0
    must become +1, the smallest one counts negative.

    Args:
        M: (..., r, r), any floating dtype.
        strength: λ of ``soften``.
        reflections: False for rotations, SO(r), see ``special_orthogonal``; True for O(r).
        floor: as in ``polar``.

    Returns:
        R (..., r, r) and ‖RᵀR − I‖_max (...), both float32 (float64 for float64), NaN where M is not finite; and (...), the
        number of directions below the floor.

    Raises:
        ValueError: not square, or a strength outside [0, 1].
        TypeError: not floating-point.
    """
    check_square(M=M)
    check_strength(strength)
    working_dtype(M)
    return Rotations(*_procrustes(M.detach(), float(strength), reflections, float(floor)))


def rotate_average(F: Tensor, R: Tensor | None, weights: Tensor) -> Tensor:
    """Compute F̄ = Σ wᵢ RᵢᵀFᵢ, the weights normalised to Σ wᵢ = 1, accumulated in float32 client by client.

    Args:
        F: (N, ..., r, d), any floating dtype.
        R: (N, ..., r, r), or None for the plain weighted mean.
        weights: (N,), non-negative, not all zero; not checked on a GPU.

    Returns:
        (..., r, d), float32 (float64 if F is).

    Raises:
        ValueError: shapes or weights that do not fit.
        TypeError: not floating-point.
    """
    if weights.shape != F.shape[:1]:
        raise ValueError(f"expected one weight per client, got weights {tuple(weights.shape)} and F {tuple(F.shape)}")
    mean: Tensor = _rotate_average(F.detach(), None if R is None else R.detach(), weights.detach())
    return mean
