"""Gram matrices by float32 products.

A float32 product of frames keeps half the digits of the errors, which are small differences of large products. So what is
multiplied is Nᵢ = RᵢᵀFᵢ − C, with rotations Rᵢ and a centre C that leave little of what the clients have in common. The
products of Fᵢ are put together of these in float64. Their rounding is that of Nᵢ.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..grouping import group_indices

_STACKED = 1 << 19  # entries that are stacked at a time: touching new memory takes longer than the products
_LEAST, _MOST = 1e-24, 1e24  # squares between which float32 products neither under- nor overflow


class Centred:
    """Gram matrices of frames of G adapters of one rank by float32 products of what they differ by.

    Attributes:
        R: (G, n, r, r), float32, orthogonal.
        C: per adapter (r, d).
    """

    def __init__(self, R: Tensor, C: Sequence[Tensor]):
        self.R, self.C = R, C

    def __call__(self, frames: Sequence[Sequence[Tensor]]) -> Tensor:
        """SSᵀ, (G, n·r, n·r), float64."""
        G, n, r = self.R.shape[:3]
        K = torch.empty(G, n * r, n * r, dtype=torch.float64, device=self.R.device)
        for part in _of_one_shape(frames):
            S = torch.stack([F for i in part for F in frames[i]]).float().view(len(part), n, *frames[part[0]][0].shape)
            C = torch.stack([self.C[i] for i in part]).float()[:, None]
            S = torch.cat([torch.matmul(self.R[part].mT, S).sub_(C), C], dim=1).flatten(1, 2)
            products = _square(S).view(-1, n + 1, r, n + 1, r)
            to_C = products[:, :n, :, n:]
            centred = products[:, :n, :, :n] + (to_C + products[:, n:, :, n:]) + to_C.permute(0, 3, 4, 1, 2)  # (Nᵢ+C)(Nⱼ+C)ᵀ
            R = self.R[part].double()
            R = R @ (1.5 * torch.eye(r, dtype=R.dtype, device=R.device) - 0.5 * (R.mT @ R))  # orthogonal in float64, too
            turned = torch.matmul(R, centred.flatten(3)).view(-1, n * r, n, r).transpose(1, 2)
            K[part] = torch.matmul(turned, R.mT).transpose(1, 2).reshape(-1, n * r, n * r)
        return K


def _of_one_shape(frames: Sequence[Sequence[Tensor]]) -> Iterator[list[int]]:
    """Indices of adapters whose frames are of one shape, as many as are stacked in memory that is used again and again."""
    for group in group_indices(clients[0].shape for clients in frames):
        clients = frames[group[0]]
        size = max(1, _STACKED // (len(clients) * clients[0].numel()))
        yield from (group[i : i + size] for i in range(0, len(group), size))


def _square(S: Tensor) -> Tensor:
    """SSᵀ in float64 of S (G, k, d), multiplied in float32 if its range allows."""
    products = torch.bmm(S, S.mT)
    largest = products.diagonal(dim1=1, dim2=2).amax(1)
    if bool(((largest > _LEAST) & (largest < _MOST)).all()):
        return products.double()
    return torch.bmm(S.double(), S.double().mT)
