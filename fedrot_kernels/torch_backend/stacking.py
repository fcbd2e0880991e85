"""One factor of several adapters from all clients as the operand of batched products: rows of A, columns of B."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..grouping import group_indices
from ..types import Clients

# Entries of a factor from which on it is multiplied where it is: copying it takes longer than a call per client.
_LARGE = 1 << 14
# Entries that are stacked at a time: as many as an L2 cache holds.
_PART = 1 << 17
# Least number of columns of the products of B. Several rows are taken as one to reach it, and the blocks off the diagonal
# are left out: at r = 4 and 8 this halves the time of the product and of stacking.
_COLUMNS = 16


def parts(factors: Sequence[Clients]) -> Iterator[list[int]]:
    """Yield indices of factors of equal shape and dtype, as many at a time as are worked on together."""
    for group in group_indices((clients[0].shape, clients[0].dtype) for clients in factors):
        clients = factors[group[0]]
        size = max(1, _PART // (len(clients) * clients[0].numel()))
        if _is_large(clients):
            size = 1
        yield from (group[i : i + size] for i in range(0, len(group), size))


class _Memory:
    """Memory in which factors are stacked, reused from part to part."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size, memory = math.prod(shape), self._memory.get((name, dtype))
        if memory is None or len(memory) < size:
            memory = self._memory[name, dtype] = torch.empty(size, dtype=dtype, device=device)
        return memory[:size].view(shape)

    def stack(self, part: list[Clients], dtype: torch.dtype) -> Tensor:
        """(G, N, …) in ``dtype`` of G adapters' (N, …) or N × (…); the tensor itself if nothing has to change."""
        first, device = part[0][0], part[0][0].device
        if len(part) == 1 and isinstance(part[0], Tensor):
            S = part[0][None]
        else:
            S = self.empty("given", (len(part), len(part[0]), *first.shape), first.dtype, device)
            flat = [x for clients in part for x in clients]
            torch.cat(flat, out=S.flatten(0, 2))
        return self.convert(S, dtype)

    def convert(self, S: Tensor, dtype: torch.dtype) -> Tensor:
        return S if S.dtype == dtype else self.empty("converted", S.shape, dtype, S.device).copy_(S)


class Rows(_Memory):
    """A (r, d_in) of every client, or any other frames (r, d) as they are."""

    def products(self, part: list[Clients], F_ref: Tensor) -> Tensor:
        """(G, N, r, r) AᵢA_refᵀ, with F_ref (G, r, d) in the working dtype."""
        r = F_ref.shape[1]
        # One of the two layouts of a right factor is up to half as fast again: which one depends on the rank.
        T = F_ref.mT.contiguous() if r >= 16 else F_ref.mT
        if _is_separate(part):
            return torch.stack([x.to(T.dtype) @ T[0] for x in part[0]])[None]
        return torch.bmm(self.stack(part, T.dtype).flatten(1, 2), T).view(len(part), -1, r, r)

    def averages(self, part: list[Clients], W: Tensor) -> Tensor:
        """(G, r, d) Σ WᵢᵀAᵢ, with W (G, N, r, r) in the working dtype."""
        if _is_separate(part):
            products = zip(W[0].mT, part[0], strict=True)
            w, x = next(products)
            total: Tensor = w @ x.to(w.dtype)
            for w, x in products:
                total.addmm_(w, x.to(w.dtype))
            return total[None]
        return torch.bmm(W.permute(0, 3, 1, 2).flatten(2), self.stack(part, W.dtype).flatten(1, 2))


class Columns(_Memory):
    """B (d_out, r) of every client, m rows taken as one: (d/m, m·r)."""

    def products(self, part: list[Clients], F_ref: Tensor) -> Tensor:
        """(G, N, r, r) BᵢᵀB_ref, with F_ref (G, d, r) in the working dtype."""
        G, d, r = F_ref.shape
        m = _rows_for_one(d, r)
        F = F_ref.reshape(G, d // m, m * r)
        if _is_large(part[0]):
            products = torch.stack([F[0].T @ x.to(F.dtype).reshape(d // m, m * r) for x in part[0]], dim=1)
        else:
            products = torch.bmm(F.mT, self._side_by_side(part, m, F.dtype))
        # Only the products of a row with itself count: the sum over the diagonal of m × m blocks.
        products = products.view(G, m, r, -1, m, r).diagonal(dim1=1, dim2=4).sum(-1)
        return products.permute(0, 2, 3, 1)

    def averages(self, part: list[Clients], W: Tensor) -> Tensor:
        """(G, d, r) Σ BᵢWᵢ, with W (G, N, r, r) in the working dtype."""
        (d, r), (G, n) = part[0][0].shape, W.shape[:2]
        m = _rows_for_one(d, r)
        blocks = W.new_zeros(G, m, r, n, m, r)
        blocks.diagonal(dim1=1, dim2=4).copy_(W.permute(0, 3, 1, 2)[..., None])
        T = blocks.view(G, m * r, n * m * r).mT
        if not _is_large(part[0]):
            return torch.bmm(self._side_by_side(part, m, W.dtype), T).view(G, d, r)
        products = zip(part[0], T[0].view(n, m * r, m * r), strict=True)
        x, w = next(products)
        total: Tensor = x.to(w.dtype).reshape(d // m, m * r) @ w
        for x, w in products:
            total.addmm_(x.to(w.dtype).reshape(d // m, m * r), w)
        return total.view(1, d, r)

    def _side_by_side(self, part: list[Clients], m: int, dtype: torch.dtype) -> Tensor:
        """(G, d/m, N·m·r)."""
        first, n = part[0][0], len(part[0])
        (d, r), given = first.shape, first.dtype
        S = self.empty("given", (len(part), d // m, n * m * r), given, first.device)
        for clients, out in zip(part, S, strict=True):
            if isinstance(clients, Tensor):
                out.view(d // m, n, m * r).copy_(clients.reshape(n, d // m, m * r).transpose(0, 1))
            else:
                torch.cat([x.reshape(d // m, m * r) for x in clients], dim=1, out=out)
        return self.convert(S, dtype)


def _is_large(clients: Clients) -> bool:
    return clients[0].numel() >= _LARGE


def _is_separate(part: list[Clients]) -> bool:
    return _is_large(part[0]) and not isinstance(part[0], Tensor)


def _rows_for_one(d: int, r: int) -> int:
    """How many rows of B are taken as one."""
    m = 1
    while m * r < _COLUMNS and d % (2 * m) == 0:
        m *= 2
    return m
