"""The tensor-level operations on a GPU: a batch of equal shapes is treated as a model whose adapters are alike."""

import math

import torch
from torch import Tensor

from .launch import ALIGNMENT, padded_rank
from .rotations import rotations
from .tables import one_adapter
from .whole_model import Model


def cross_covariance(F: Tensor, F_ref: Tensor) -> Tensor:
    """Compute ``ops.cross_covariance`` of F (*clients, *batch, r, d) and F_ref (*batch, r, d)."""
    r, d = F_ref.shape[-2:]
    n, g = math.prod(F.shape[: -F_ref.dim()]), math.prod(F_ref.shape[:-2])
    if not F.numel():
        return F.new_zeros(*F.shape[:-1], r, dtype=torch.float32)
    model = _model(F.reshape(n, g, r, d), F_ref.reshape(g, r, d))
    slices = model.cross_covariance()
    M = slices.view(g, -1, *slices.shape[1:])[:, :, :n, :r, :r].sum(1)
    return M.transpose(0, 1).reshape(*F.shape[:-1], r)


def procrustes(M: Tensor, *, strength: float, reflections: bool, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``ops.procrustes`` of M (..., r, r), float32 or lower, not empty."""
    r = M.shape[-1]
    flat = M.float().reshape(1, -1, r, r).contiguous()
    if flat.data_ptr() % ALIGNMENT:
        flat = flat.clone()  # so that the kernel specialised for alignment runs, which is the one in the compile matrix
    R, residual, undetermined = rotations(
        flat,
        one_adapter(r, M.device),
        RP=padded_rank(r),
        leading=r,
        n_clients=flat.shape[1],
        joint=False,
        strength=strength,
        reflections=reflections,
        floor=floor,
    )
    if strength == 0:  # exactly I, which the iteration misses by its rounding
        R = torch.where(R.isfinite(), torch.eye(r, dtype=R.dtype, device=R.device), R)
    return R.reshape(M.shape), residual.reshape(M.shape[:-2]), undetermined.reshape(M.shape[:-2])


def rotate_average(F: Tensor, R: Tensor, weights: Tensor) -> Tensor:
    """Compute ``ops.rotate_average`` of F (N, *batch, r, d) and R (N, *batch, r, r)."""
    (n, *batch, r, d), g = F.shape, math.prod(F.shape[1:-2])
    if not F.numel():
        return F.new_zeros(F.shape[1:], dtype=torch.float32)
    model = _model(F.reshape(n, g, r, d), None)
    padded = F.new_zeros(g, n, model.RP, model.RP, dtype=torch.float32)
    padded[:, :, :r, :r] = R.expand(*F.shape[:-1], r).reshape(n, g, r, r).transpose(0, 1)
    w = weights.to(F.device, torch.float64)
    means, _ = model.rotate_average(padded, (w / w.sum()).float(), torch.float32)
    means_A, means_B = means[::2], means[1::2]  # one of the two holds empty tensors
    return torch.stack(means_A if means_A[0].numel() else [x.mT for x in means_B]).reshape(*batch, r, d)


def _model(F: Tensor, F_ref: Tensor | None) -> Model:
    """Take frames (N, G, r, d) as A, or as B if their transpose is contiguous; the other factor is empty."""
    n, g, r, _ = F.shape
    empty = F.new_empty(n, r, 0)
    if F.mT.is_contiguous() and not F.is_contiguous():
        stacks, refs = [F[:, i].mT for i in range(g)], None if F_ref is None else list(F_ref.mT)
        return Model([empty] * g, stacks, None, refs)
    return Model([F[:, i] for i in range(g)], [empty.mT] * g, None if F_ref is None else list(F_ref), None)
