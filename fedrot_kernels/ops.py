"""The tensor-level operations, registered with ``torch.library``: opaque to compilers, not differentiated through.

Each runs on the Triton kernels where ``dispatch.use_triton`` allows, in PyTorch elsewhere: on a CPU, for float64, and for
ranks over 128.
"""

import torch
from torch import Tensor

from .checks import check_frames, check_square, check_strength, read_weights
from .dispatch import use_triton
from .precision import full_precision, working_dtype
from .tolerances import ROUNDING_FLOOR
from .torch_backend import procrustes as torch_procrustes
from .torch_backend import products as torch_products


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
def _procrustes(M: Tensor, strength: float, reflections: bool, floor: float) -> tuple[Tensor, Tensor]:
    if use_triton("auto", [M], M.shape[-1]) and M.numel():
        from .triton_backend.batches import procrustes

        return procrustes(M, strength=strength, reflections=reflections, floor=floor)
    return torch_procrustes.procrustes(M, strength=strength, reflections=reflections, floor=floor)


@_procrustes.register_fake
def _(M: Tensor, strength: float, reflections: bool, floor: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    dtype = working_dtype(M)
    return M.new_empty(M.shape, dtype=dtype), M.new_empty(M.shape[:-2], dtype=dtype)


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
    """The orthogonal polar factor R of M = R H, reflections included, by Newton–Schulz.

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


def procrustes(M: Tensor, *, strength: float = 1.0, reflections: bool = False, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Compute the rotation of a cross-covariance, and how far from orthogonal it is.

    Args:
        M: (..., r, r), any floating dtype.
        strength: λ of ``soften``.
        reflections: False for rotations, SO(r), see ``special_orthogonal``; True for O(r).
        floor: as in ``polar``.

    Returns:
        R (..., r, r) and ‖RᵀR − I‖_max (...), both float32 (float64 for float64); NaN where M is not finite.

    Raises:
        ValueError: not square, or a strength outside [0, 1].
        TypeError: not floating-point.
    """
    check_square(M=M)
    check_strength(strength)
    working_dtype(M)
    found: tuple[Tensor, Tensor] = _procrustes(M.detach(), float(strength), reflections, float(floor))
    return found


@full_precision
def partial_isometries(M: Tensor, rank_mask: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Compute the softened rotations of padded clients, and how far from orthogonal they are.

    The rotation of a padded client is a partial isometry: only its first rᵢ rows are used, and the other rows are set to
    zero. With J = [I 0] of rᵢ rows it is polar((1−λ) J + λ polar(Mᵢ)). It is the same in SO(r) and O(r), because the unused
    rows can complete it to either determinant.

    Args:
        M: (G, r, r), cross-covariances; rows of zero where a client is padded. float32 or float64.
        rank_mask: (G, r, 1), bool: which rows are the client's own.
        strength: λ in [0, 1].

    Returns:
        R (G, r, r), and ‖RᵀR − I‖_max (G,) before the other rows are set to zero.
    """
    R, residual = procrustes(M, reflections=True, floor=ROUNDING_FLOOR[M.dtype])
    if strength < 1:
        eye = torch.eye(M.shape[-1], dtype=R.dtype, device=R.device)
        blend = torch.where(rank_mask, (1 - strength) * eye + strength * R, 0)
        R, residual = procrustes(blend, reflections=True, floor=ROUNDING_FLOOR[R.dtype])
    return R * rank_mask, residual


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
