"""Clients of smaller ranks in the ranks of the result, by rows of zero.

B·A of a padded client stays what it was, and so does s·B·A, because B is multiplied by sᵢ/s. The rotation of a padded client
is a partial isometry: only its first rᵢ rows are used; the others are zero.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedrot_kernels import widen

from ..adapters.common import with_rank
from ..adapters.keys import TensorSpec
from ..adapters.layout import Adapter, Layout
from ..adapters.storage import Storage
from ..adapters.update import Update


def pad(client: Update, layout: Layout, s_client: dict[str, float], s_result: dict[str, float]) -> Update:
    """Pad a client to the layout's ranks, and bring it to the result's scaling.

    Args:
        client: the client, which has the layout or smaller ranks.
        layout: the layout of the result.
        s_client, s_result: module → s, of the client and of the result.

    Returns:
        The client with factors in float32 (float64 for float64), not rounded yet.
    """
    tensors = {key: client[key] for key in layout.other_keys}
    ranks = {a.key_A: client.specs[a.key_A].shape[0] for a in layout.adapters}
    for a in layout.adapters:
        s = s_client[a.module] / s_result[a.module]
        A, B = (widen(client[key]) for key in (a.key_A, a.key_B))
        tensors[a.key_A] = _with_zeros(A, 0, a.rank)
        tensors[a.key_B] = _with_zeros(B if s == 1 else B * s, 1, a.rank)
        if (bias := f"{a.module}.lora_B.bias") in tensors:
            tensors[bias] = widen(tensors[bias]) * s
    keys_given = {key: key for key in layout.specs}
    narrow = any(ranks[a.key_A] < a.rank for a in layout.adapters)
    narrow_ranks, here = ranks if narrow else None, Storage(keys_given)
    return Update(client.name, layout.specs, keys_given, tensors, client.device, None, narrow_ranks, here)


def revive_dead_ranks(
    mean: dict[str, Tensor], layout: Layout, reference: Update, adapters: Iterable[Adapter] | None = None
) -> dict[str, Tensor]:
    """Give ranks that no client of a round has the reference's rows of A, where A and B are both zero.

    B·A stays what it is. A row of A and a column of B that are both zero would never have a gradient again.

    Args:
        mean: canonical key → mean, in the layout's shapes and dtypes.
        layout: the layout of the result.
        reference: the reference, in the layout's ranks.
        adapters: those that can have such ranks; None for all of the layout.
    """
    for a in layout.adapters if adapters is None else adapters:
        A, B = mean[a.key_A], mean[a.key_B]
        dead = ~(A.flatten(1).any(1) | B.transpose(0, 1).flatten(1).any(1))
        if bool(dead.any()):
            kept = reference[a.key_A].detach().to(A.device, A.dtype).reshape(A.shape)
            mean = mean | {a.key_A: torch.where(dead.reshape(-1, *[1] * (A.dim() - 1)), kept, A)}
    return mean


def widest_client(clients: Sequence[Update], weights: Sequence[float], layout: Layout) -> Update:
    """The client of the largest ranks among those of positive weight; of several the one of the largest weight.

    Of several clients of one weight, the first is taken.
    """
    total = sum(a.rank for a in layout.adapters)
    ranks = [total if client.ranks is None else sum(client.ranks.values()) for client in clients]
    return clients[max(range(len(clients)), key=lambda i: (weights[i] > 0, ranks[i], weights[i]))]


def rank_mask(adapter: Adapter, clients: Sequence[Update]) -> Tensor:
    """Which rows of an adapter are the clients' own and not padding, (N, r, 1), bool."""
    own = [adapter.rank if client.ranks is None else client.ranks[adapter.key_A] for client in clients]
    return torch.arange(adapter.rank, device="cpu")[None, :, None] < torch.tensor(own, device="cpu")[:, None, None]


def _with_zeros(x: Tensor, axis: int, rank: int) -> Tensor:
    """The tensor with zeros appended along an axis, up to a rank."""
    if x.shape[axis] == rank:
        return x
    zeros = x.new_zeros(with_rank(TensorSpec(tuple(x.shape), x.dtype), axis, rank - x.shape[axis]).shape)
    return torch.cat([x, zeros], dim=axis)
