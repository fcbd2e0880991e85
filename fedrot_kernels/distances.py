"""Distances between clients' updates: ‖sᵢBᵢAᵢ − sⱼBⱼAⱼ‖_F of all pairs, from Gram matrices of the factors.

Let c be one client, the centre, and aᵢ = Aᵢ − A_c and bᵢ = Bᵢ − B_c. Then Eᵢ = BᵢAᵢ − B_cA_c = Bᵢaᵢ + bᵢA_c, and

    ⟨Eᵢ, Eⱼ⟩ = ⟨BᵢᵀBⱼ, aᵢaⱼᵀ⟩ + ⟨Bᵢᵀbⱼ, aᵢA_cᵀ⟩ + ⟨bᵢᵀBⱼ, A_c aⱼᵀ⟩ + ⟨bᵢᵀbⱼ, A_cA_cᵀ⟩.

All of it follows from the Gram matrices of [a₁; …; A_c; …; a_N] and [b₁ … B_c … b_N], whose cost is linear in d. Clients
that differ little have small aᵢ and bᵢ, so that nothing cancels. Clients that differ by their bases alone cancel, down to
the rounding of float64. A centre that is larger than most clients would spoil the distances of all. So the centre is the
client of the median ‖A‖‖B‖, after A and B of every client have been scaled to the ratio that most clients have.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .checks import common_kinds, count_clients, firsts
from .dispatch import use_native
from .grouping import group_indices
from .precision import full_precision
from .types import Backend, Clients, Factors

_ENTRIES, _ENTRIES_ON_GPU = 1 << 18, 1 << 25  # in float64 that are stacked at a time: on a CPU they stay in its cache
_ROUNDING = 64 * torch.finfo(torch.float64).eps  # of the products whose difference a squared distance is


@full_precision
def squared_distances(
    A: Factors, B: Factors, scales: Sequence[Sequence[float]] | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """Compute ‖sᵢBᵢAᵢ − sⱼBⱼAⱼ‖² of L adapters and all pairs of N clients. No synchronisation with a GPU.

    An invertible G that turns a client's factors into BG and G⁻¹A leaves the distances as they are, to rounding.

    Args:
        A: per adapter (N, r, d_in), or a sequence of N tensors (r, d_in), whose ranks may differ. Any floating-point dtype.
        B: per adapter (N, d_out, r), or a sequence of N tensors (d_out, r).
        scales: per adapter the N clients' sᵢ; None for 1.
        backend: as in ``align_average``. The compiled library takes clients of one rank per adapter, without scales.

    Returns:
        (L, N, N) float64 on the factors' device, symmetric, zero on the diagonal, not negative. With
        uᵢ = ‖Bᵢ‖‖Aᵢ − A_c‖ + ‖Bᵢ − B_c‖‖A_c‖, an entry is off by at most a few eps · (uᵢ² + uⱼ²), eps being that of float64;
        entries below 64 eps · (uᵢ² + uⱼ²) count as zero. Factors with NaN, or whose products overflow, give NaN or Inf.
    """
    if scales is None and _is_compiled(A, B, backend):
        from .native_backend.distances import measure_products  # not at the top: it imports the torch backend

        return between_updates(*measure_products(A, B))
    n, device = len(A[0]), A[0][0].device
    found = torch.empty(len(A), n, n, dtype=torch.float64, device=device)
    ranks = [max(x.shape[0] for x in clients) for clients in A]
    shapes = [(r, a[0].shape[1], b[0].shape[0]) for r, a, b in zip(ranks, A, B, strict=True)]
    for group in group_indices(shapes):
        r, d_in, d_out = shapes[group[0]]
        most = _ENTRIES if device.type == "cpu" else _ENTRIES_ON_GPU
        size = min(len(group), max(1, most // (n * r * max(d_in, d_out))))
        # The same memory again and again: touching new memory takes as long as the products.
        memory_A = torch.empty(size, n * r, d_in, dtype=torch.float64, device=device)
        memory_B = torch.empty(size, d_out, n * r, dtype=torch.float64, device=device)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            S_A, S_B = memory_A[: len(part)], memory_B[: len(part)]
            for g, i in enumerate(part):
                S_A[g].copy_(torch.cat([_with_rank(x, r, 0) for x in A[i]], dim=0))
                S_B[g].copy_(torch.cat([_with_rank(x, r, 1) for x in B[i]], dim=1))
            if scales is not None:
                s = torch.tensor([scales[i] for i in part], dtype=torch.float64, device="cpu").to(device)
                S_B *= s.repeat_interleave(r, dim=1)[:, None]
            found[part] = _square_distances(S_A, S_B, n)
    return found


@full_precision
def squared_distances_plain(tensors: Sequence[Clients]) -> Tensor:
    """Compute ‖xᵢ − xⱼ‖² of K tensors and all pairs of N clients: (K, N, N) float64, as ``squared_distances`` does.

    Args:
        tensors: per tensor (N, …), or a sequence of N tensors of one shape. Any floating-point dtype.
    """
    n, device = len(tensors[0]), tensors[0][0].device
    found = torch.zeros(len(tensors), n, n, dtype=torch.float64, device=device)
    most = _ENTRIES if device.type == "cpu" else _ENTRIES_ON_GPU
    for K, clients in zip(found, tensors, strict=True):
        flat = [x.detach().flatten() for x in clients]
        size = max(1, most // n)
        parts = [slice(start, start + size) for start in range(0, len(flat[0]), size)]
        squares = [torch.stack([x[part] for x in flat]).double().square().sum(1) for part in parts]
        centre = torch.stack([*squares, torch.zeros(n, dtype=torch.float64, device=device)]).sum(0).argsort(stable=True)
        for part in parts:
            S = torch.stack([x[part] for x in flat]).double()
            S = S - S.index_select(0, centre[(n - 1) // 2 :][:1])
            K += S @ S.mT
    return between_updates(found, found.diagonal(dim1=1, dim2=2))


def _is_compiled(A: Factors, B: Factors, backend: Backend) -> bool:
    """Whether the compiled library takes all factors: on a CPU, in one of its dtypes, of one rank per adapter."""
    samples = firsts(A)
    if not use_native(backend, samples, max(a.shape[0] for a in samples)):
        return False
    return None not in (common_kinds(A, count_clients(A)), common_kinds(B, count_clients(B)))


def _with_rank(F: Tensor, r: int, axis: int) -> Tensor:
    """A factor with rows (axis 0) or columns of zero up to rank r."""
    if (lacking := r - F.shape[axis]) == 0:
        return F.detach()
    return torch.cat([F.detach(), F.new_zeros([lacking if i == axis else size for i, size in enumerate(F.shape)])], dim=axis)


def _square_distances(rows: Tensor, columns: Tensor, n: int) -> Tensor:
    """The squared distances (G, N, N) of updates BᵢAᵢ.

    Args:
        rows: (G, N·r, d_in), [A₁; …; A_N] in float64, which is overwritten.
        columns: (G, d_out, N·r), [B₁ … B_N], likewise.
        n: N.
    """
    G, r, adapters = len(rows), rows.shape[1] // n, torch.arange(len(rows), device=rows.device)
    A, B = rows.view(G, n, r, -1), columns.view(G, -1, n, r).transpose(1, 2)
    norm_A, norm_B = (torch.linalg.vector_norm(F, dim=(2, 3)) for F in (A, B))
    turn = _usual_ratio(norm_A, norm_B)
    if rows.device.type != "cpu" or bool((turn != 1).any()):
        A *= turn[:, :, None, None]
        B /= turn[:, :, None, None]
    centre = (norm_A * norm_B).argsort(dim=1, stable=True)[:, (n - 1) // 2]
    for F in (A, B):
        C = F[adapters, centre]
        F -= C[:, None]
        F[adapters, centre] = C
    K_A, K_B = (_gram(S).view(G, n, r, n, r) for S in (rows, columns.mT))
    from_A, from_B = K_A[adapters, centre], K_B[adapters, centre]  # A_c aⱼᵀ and B_cᵀbⱼ, (G, r, N, r)
    CC_A, CC_B = (x[adapters, :, centre] for x in (from_A, from_B))  # (G, r, r)
    to_A, to_B = (x.permute(0, 2, 3, 1)[:, :, :, None] for x in (from_A, from_B))  # aᵢA_cᵀ and bᵢᵀB_c, (G, N, r, 1, r)
    mixed = K_B + from_B[:, None]  # Bᵢᵀbⱼ
    whole = mixed + (to_B + CC_B[:, None, :, None])  # BᵢᵀBⱼ
    once = (K_A * whole).add_(K_B * CC_A[:, None, :, None]).sum((2, 4))
    twice = (to_A * mixed).sum((2, 4))
    moved = torch.arange(n, device=rows.device) != centre[:, None]
    products = (once + twice + twice.mT) * (moved[:, :, None] & moved[:, None])
    # uᵢ, from the traces of the Gram matrices
    a, b = (K.diagonal(dim1=1, dim2=3).diagonal(dim1=1, dim2=2).sum(2).sqrt() for K in (K_A, K_B))
    C_a, C_b = (x[adapters, centre][:, None] for x in (a, b))
    return between_updates(products, (((C_b + b) * a + b * C_a) * moved).square())


def _usual_ratio(norm_A: Tensor, norm_B: Tensor) -> Tensor:
    """The powers of 2 (G, N) that A is multiplied and B divided by, so that ‖B‖/‖A‖ is about that of most clients.

    Args:
        norm_A, norm_B: (G, N).
    """
    ratio = norm_B.log2() - norm_A.log2()  # whose half counts, for both factors change
    ratio = torch.where(ratio.isfinite(), ratio, torch.nan)
    half = ((ratio - ratio.nanmedian(dim=1, keepdim=True).values) / 2).nan_to_num(0).round()
    return half.exp2()


def _gram(S: Tensor) -> Tensor:
    """S Sᵀ, (G, k, k), of S (G, k, d): on a CPU by blocks on and above the diagonal only."""
    k = S.shape[1]
    blocks = max(1, min(8, k // 24)) if S.device.type == "cpu" else 1
    K = S.new_empty(len(S), k, k)
    edges = [k * i // blocks for i in range(blocks + 1)]
    for start, end in pairwise(edges):
        K[:, start:end, start:] = S[:, start:end] @ S[:, start:].mT
        K[:, end:, start:end] = K[:, start:end, end:].mT
    return K


def between_updates(products: Tensor, sizes: Tensor) -> Tensor:
    """Squared distances (K, N, N) from products ⟨Eᵢ, Eⱼ⟩; zero where rounding of sizes uᵢ² (K, N) is all that is left."""
    own = products.diagonal(dim1=1, dim2=2)
    squares = own[:, :, None] + own[:, None] - (products + products.mT)
    rounding = _ROUNDING * (sizes[:, :, None] + sizes[:, None])
    return torch.where(squares <= rounding, 0, squares)
