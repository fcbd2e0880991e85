"""What fedrot is compared with, written as it is usually written."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]


def _shares(weights: Sequence[float]) -> list[float]:
    return [w / sum(weights) for w in weights]


def dictionary_loop(updates: Sequence[StateDict], weights: Sequence[float]) -> dict[str, Tensor]:
    """Plain FedAvg: for every key the weighted sum over clients."""
    shares = _shares(weights)
    mean = {}
    for key in updates[0]:
        total = torch.zeros_like(updates[0][key])
        for share, update in zip(shares, updates, strict=True):
            total += share * update[key]
        mean[key] = total
    return mean


def _svd_polar(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, _, Vh = torch.linalg.svd(M if M.dtype == torch.float64 else M.float())  # there is no SVD in half precision
    return U @ Vh, U, Vh


def published(
    updates: Sequence[StateDict], weights: Sequence[float], reference: StateDict, strength: float
) -> dict[str, Tensor]:
    """The published procedure (FedRot-LoRA, arXiv 2602.23638), aligning on A.

    Per client and adapter one SVD of A A_refᵀ (group O at λ = 1), below λ = 1 det R forced to +1 and a second SVD for
    polar((1−λ) I + λ R); then the dictionary loop.
    """
    aligned = []
    for update in updates:
        rotated = dict(update)
        for key_A in (key for key in update if "lora_A" in key):
            key_B = key_A.replace("lora_A", "lora_B")
            R, U, Vh = _svd_polar(update[key_A] @ reference[key_A].T)
            if strength < 1:
                if torch.linalg.det(R) < 0:
                    U[:, -1] *= -1
                    R = U @ Vh
                eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
                R, _, _ = _svd_polar((1 - strength) * eye + strength * R)
            R = R.to(update[key_A].dtype)
            rotated[key_A], rotated[key_B] = R.T @ update[key_A], update[key_B] @ R
        aligned.append(rotated)
    return dictionary_loop(aligned, weights)


def batched_svd(
    A: Sequence[Tensor], B: Sequence[Tensor], weights: Sequence[float], A_ref: Sequence[Tensor], strength: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The published procedure on clients stacked per adapter: one SVD for all matrices (two when soft), and bmm.

    A[l] is (N, r, d_in), B[l] (N, d_out, r); all adapters are of one rank.
    """
    N = len(A[0])
    R, U, Vh = _svd_polar(torch.cat([a @ ref.T for a, ref in zip(A, A_ref, strict=True)]))
    if strength < 1:
        U[..., -1] *= torch.linalg.det(R).sign()[:, None]
        R, _, _ = _svd_polar((1 - strength) * torch.eye(R.shape[-1], dtype=R.dtype, device=R.device) + strength * (U @ Vh))
    shares = torch.tensor(_shares(weights), dtype=R.dtype, device=R.device)
    R = (R.unflatten(0, (-1, N)) * shares[:, None, None]).to(A[0].dtype)
    mean_A = [torch.bmm(r.mT, a).sum(0) for r, a in zip(R, A, strict=True)]
    mean_B = [torch.bmm(b, r).sum(0) for r, b in zip(R, B, strict=True)]
    return mean_A, mean_B


def foreach_average(updates: Sequence[StateDict], weights: Sequence[float]) -> dict[str, Tensor]:
    """Plain FedAvg, all keys of a client at once."""
    shares = _shares(weights)
    totals = torch._foreach_mul(list(updates[0].values()), shares[0])
    for share, update in zip(shares[1:], updates[1:], strict=True):
        torch._foreach_add_(totals, list(update.values()), alpha=share)
    return dict(zip(updates[0], totals, strict=True))


def stacked_average(stacked: StateDict, weights: Sequence[float]) -> dict[str, Tensor]:
    """Plain FedAvg of stacked clients: per key one product of the shares with (N, elements)."""
    first = next(iter(stacked.values()))
    shares = torch.tensor(_shares(weights), dtype=first.dtype, device=first.device)
    return {key: (shares @ x.flatten(1)).view(x.shape[1:]) for key, x in stacked.items()}


def copy_of_bytes(moved: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Source and target of a copy that moves as many bytes: half are read, half are written."""
    return tuple(torch.ones(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))  # type: ignore[return-value]
