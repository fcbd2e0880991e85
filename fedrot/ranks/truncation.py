"""Truncation: a global adapter in the ranks and the scaling of one client, for the client to download."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters.config import check_lora, plain_config, rank_of, scaling
from ..adapters.layout import Adapter, Layout
from ..adapters.update import Update, UpdateLike, open_update
from ..adapters.values import check_range, not_finite
from ..errors import UpdateError


def truncate(adapter: UpdateLike, to: Any) -> dict[str, Tensor]:
    """Approximate an adapter as well as possible in the ranks of another LoRA configuration.

    A_k = WᵀA and B_k = s/s_k · U Uᵀ B W, where the columns of U (d_out × k) are the leading left singular vectors of B A,
    and those of W (r × k, orthonormal) span the row space of UᵀB. Then s_k B_k A_k is the best approximation of s B A of
    rank k. Among all bases of that row space, W is the one nearest [I 0]ᵀ, so that the basis changes as little as possible.

    Where B A has fewer than k directions, as in a fresh adapter, W is completed with the directions nearest the first
    coordinates, and B_k has columns of zero there, which can be trained: B = 0 gives A_k = A[:k], and A = 0 gives
    B_k = B[:, :k]. An adapter whose rank and scaling stay is returned to the bit. Computed in float64, rounded once.

    Args:
        adapter: a PEFT folder, or a pair of a state dict and its LoRA configuration; a bare state dict is enough where
            ``to`` is a number.
        to: the client's ``peft.LoraConfig`` or the content of its adapter_config.json, of which r, rank_pattern, lora_alpha,
            alpha_pattern and use_rslora count; or a rank for every adapter of a larger one, which keeps the scaling s.

    Returns:
        A state dict of the adapter's keys and dtypes, every tensor with storage of its own; other tensors as they came.

    Raises:
        UpdateError: a rank larger than the adapter's, no configuration that gives its scaling, or NaN or Inf in a factor.
    """
    whole = open_update(adapter, "the adapter")
    layout = Layout(whole.specs, whole.name)
    if found := not_finite(whole, [key for keys in layout.factor_keys for key in keys]):
        raise UpdateError(f"{whole.name}, {found}")
    ranks, ratios = _by_rank(layout, to) if isinstance(to, int) else _by_config(whole, layout, to)
    result = whole.as_given(truncate_update(whole, layout, ranks, ratios))
    check_range(result, f"{whole.name}, truncated,")
    return result


def truncate_update(
    whole: Update, layout: Layout, ranks: Mapping[str, int], ratios: Mapping[str, float]
) -> dict[str, Tensor]:
    """Truncate an adapter, by canonical key; see ``truncate``.

    Args:
        whole: the adapter.
        layout: its layout.
        ranks: module → the rank that it is to have.
        ratios: module → s/s_k, by which B is multiplied.
    """
    state_dict = {key: x.detach().clone() for key, x in whole.items()}
    for group in layout.groups:
        by_rank: dict[int, list[Adapter]] = {}
        for a in group.adapters:
            by_rank.setdefault(ranks[a.module], []).append(a)
        for k, adapters in by_rank.items():
            _truncate(adapters, k, whole, ratios, state_dict)
    for a in layout.adapters:
        if (bias := f"{a.module}.lora_B.bias") in state_dict and ratios[a.module] != 1:
            state_dict[bias] = (state_dict[bias].double() * ratios[a.module]).to(state_dict[bias].dtype)
    return state_dict


def _by_rank(layout: Layout, k: int) -> tuple[dict[str, int], dict[str, float]]:
    """The mappings module → k and module → s/s_k = 1 for one rank."""
    if isinstance(k, bool) or k < 1:
        raise UpdateError(f"a rank is a whole number from 1, got {k!r}")
    return {a.module: min(k, a.rank) for a in layout.adapters}, dict.fromkeys((a.module for a in layout.adapters), 1.0)


def _by_config(whole: Update, layout: Layout, to: Any) -> tuple[dict[str, int], dict[str, float]]:
    """The mappings module → k and module → s/s_k under a configuration."""
    if not isinstance(to, Mapping) and not hasattr(to, "to_dict"):
        raise UpdateError(f"expected a rank or a LoRA configuration to truncate to, got {type(to).__name__}")
    config = plain_config(to)
    check_lora(config, "the configuration to truncate to")
    if whole.config is None:
        raise UpdateError(
            f"{whole.name} has no LoRA configuration, without which its scaling is unknown; pass a folder, or (state dict, "
            "configuration)"
        )
    ranks, ratios = {}, {}
    for a in layout.adapters:
        k = rank_of(config, a.module, "the configuration to truncate to")
        if k > a.rank:
            raise UpdateError(
                f"{a.key_A}: rank {k} in the configuration to truncate to, but {whole.name} has "
                f"{whole.specs[a.key_A].shape}; no client's rank may exceed the global adapter's"
            )
        s, s_k = scaling(whole.config, a.module, a.rank, whole.name), scaling(config, a.module, k, "the configuration")
        ranks[a.module], ratios[a.module] = k, s / s_k
    return ranks, ratios


def _truncate(
    adapters: Sequence[Adapter], k: int, whole: Update, ratios: Mapping[str, float], state_dict: dict[str, Tensor]
) -> None:
    """Put adapters of one shape into a state dict in rank k, B multiplied by s/s_k."""
    s = [ratios[a.module] for a in adapters]
    A, B = (torch.stack([whole[key].detach().double().flatten(1) for key in keys]) for keys in zip(
        *((a.key_A, a.key_B) for a in adapters), strict=True
    ))  # fmt: skip
    if k < adapters[0].rank:
        A, B = truncate_factors(A, B, k)
    elif all(ratio == 1 for ratio in s):
        return
    B = B * torch.tensor(s, dtype=B.dtype, device=B.device)[:, None, None]
    for i, a in enumerate(adapters):
        shape_A, shape_B = (k, *whole.specs[a.key_A].shape[1:]), (a.d_out, k, *whole.specs[a.key_B].shape[2:])
        state_dict[a.key_A] = A[i].to(a.dtype, copy=True).reshape(shape_A)
        state_dict[a.key_B] = B[i].to(a.dtype, copy=True).reshape(shape_B)


def truncate_factors(A: Tensor, B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Truncate the factors of G adapters to rank k; see ``truncate``.

    Args:
        A, B: (G, r, d_in) and (G, d_out, r), float64.
        k: the rank, less than r.

    Returns:
        WᵀA (G, k, d_in) and U Uᵀ B W (G, d_out, k).
    """
    r, dtype, device = A.shape[1], A.dtype, A.device
    R_A = torch.linalg.qr(A.mT, mode="r").R
    Q_B, R_B = torch.linalg.qr(B)
    U, sigma, _ = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    noise = max(A.shape[2], B.shape[1]) * torch.finfo(dtype).eps * sigma[:, :1]
    U = U[:, :, :k] * (sigma[:, None, :k] > noise[:, :, None])
    C = U.mT @ R_B
    _, size, Vt = torch.linalg.svd(C, full_matrices=False)
    # Columns of zero in U, one for every direction that is lacking, are rows of zero in C.
    V = Vt.mT * (torch.arange(size.shape[1], device=device) < (sigma[:, :k] > noise).sum(1, keepdim=True))[:, None]
    P = V @ V.mT
    # Eigenvectors of eigenvalue 2 span the row space; the next ones are nearest the first coordinates, which they are to the
    # bit if there is nothing to approximate.
    E = torch.eye(r, k, dtype=dtype, device=device)
    rest = E - P @ E
    W = torch.linalg.eigh(2 * P + rest @ rest.mT).eigenvectors[:, :, -k:]
    X, _, Yt = torch.linalg.svd(W.mT @ E)
    W = W @ (X @ Yt)
    empty = (A == 0).all(2, keepdim=True).all(1, keepdim=True)
    return W.mT @ A, torch.where(empty, B[:, :, :k], Q_B @ (U @ (C @ W)))
