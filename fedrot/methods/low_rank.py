"""Methods that compute a result from all clients' factors at once, and not from a d_out × d_in matrix of the mean update."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrot_kernels import average, full_precision, product_norm, working_dtype

from ..adapters.experts import parameter_of
from ..adapters.layout import Adapter, Layout
from ..errors import UpdateError
from ..ranks.collapse import inverse_shares
from .base import Method
from .round import Averages, Round
from .running_mean import shares_of

_ENTRIES = 1 << 25  # of clients' factors that are copied together at a time


@dataclass(frozen=True)
class Combined:
    """The result for G adapters of one shape, in units of their scaling s.

    Attributes:
        A, B: the factors that clients continue from, (G, r, d_in) and (G, d_out, r).
        base: factors (G, K, d_in) and (G, d_out, K) of what is to be added to the base weight, or None.
        ranks: how many rows of A and columns of B each adapter keeps, where the method chooses that; None for all.
        base_ranks: how many rows and columns of ``base`` each adapter keeps, likewise.
    """

    A: Tensor
    B: Tensor
    base: tuple[Tensor, Tensor] | None = None
    ranks: Sequence[int] | None = None
    base_ranks: Sequence[int] | None = None


class LowRankMethod(Method):
    """Subclasses say how the stacked factors of adapters of one shape become one."""

    needs_all = True

    @abstractmethod
    def combine(self, A: Tensor, B: Tensor, w: Tensor, dtype: torch.dtype) -> Combined:
        """Σ wᵢBᵢAᵢ, or what the method makes of it.

        Args:
            A, B: (G, N, r, d_in) and (G, N, d_out, r), float32 or float64; where ranks or scalings differ, with rows of
                zero, and B scaled so that s is the same for all.
            w: (N,), summing to 1, of their dtype.
            dtype: that the result is rounded to.
        """

    def check(self, layout: Layout) -> None:
        """See ``Method.check``."""
        super().check(layout)
        experts = (a for a in layout.adapters if self.changes_ranks and parameter_of(a.module))
        if self.options.energy is not None and (a := next(experts, None)):
            raise UpdateError(
                f"{a.key_A}: energy={self.options.energy} chooses a rank for every adapter, and the experts of one "
                "parameter have one rank; pass server_rank= instead"
            )

    @full_precision
    def aggregate(self, round: Round) -> Averages:
        """Combine the adapters of one shape at a time, and average what is no factor."""
        layout, mean, base, errors = round.layout, dict[str, Tensor](), dict[str, Tensor](), dict[str, tuple[float, float]]()
        ranks: dict[str, int] = {}
        if (self.updates_base or self.changes_ranks) and round.scalings is None:
            does = "adds s·B·A to the base weights" if self.updates_base else "changes the ranks of s·B·A"
            raise UpdateError(
                f"{self.name} {does} and needs the scaling s: pass folders, or the clients' LoRA configuration "
                "(configs=model.peft_config['default'])"
            )
        if layout.other_keys:
            tensors = [[client[key] for client in round.clients] for key in layout.other_keys]
            means, _ = average(tensors, round.weights, backend=self.options.backend)
            mean |= zip(layout.other_keys, means, strict=True)
        shares = shares_of(round.weights)
        for adapters, A, B in _stacks(round):
            w = torch.tensor(shares, dtype=A.dtype, device=A.device)
            B_counted = B
            if self.options.collapse == "raflora":
                rows = torch.stack([inverse_shares(a, round.clients, shares) for a in adapters])
                B_counted = B * rows.to(B.device, B.dtype)[:, None, None]
            combined = self.combine(A, B_counted, w, adapters[0].dtype)
            for i, a in enumerate(adapters):
                r = ranks[a.key_A] = combined.A.shape[1] if combined.ranks is None else combined.ranks[i]
                shape_A, shape_B = layout.specs[a.key_A].shape, layout.specs[a.key_B].shape
                mean[a.key_A] = combined.A[i, :r].to(a.dtype, copy=True).reshape(r, *shape_A[1:])
                mean[a.key_B] = combined.B[i, :, :r].to(a.dtype, copy=True).reshape(shape_B[0], r, *shape_B[2:])
                if combined.base is not None:
                    assert round.scalings is not None
                    K = None if combined.base_ranks is None else combined.base_ranks[i]
                    A_base, B_base = combined.base[0][i, :K], round.scalings.result[a.module] * combined.base[1][i, :, :K]
                    base[a.key_A] = A_base.reshape(-1, *layout.specs[a.key_A].shape[1:]).clone()
                    base[a.key_B] = B_base.reshape(*B_base.shape, *layout.specs[a.key_B].shape[2:]).clone()
            if self.options.report_error:
                measured = zip(*_errors(A, B, w, _cut(combined), adapters[0].dtype), strict=True)
                errors |= {a.key_A: values for a, values in zip(adapters, measured, strict=True)}
        _pad_experts(base, layout)
        sound = bool(torch.stack([x.isfinite().all() for x in (*mean.values(), *base.values())]).all())
        in_order = [errors[a.key_A] for a in layout.adapters] if self.options.report_error else None
        mean = {key: mean[key] for key in layout.specs if key in mean}
        chosen = [ranks[a.key_A] for a in layout.adapters] if self.changes_ranks else None
        return Averages(mean, [], [], None, None, sound, base or None, in_order, ranks=chosen)


def _pad_experts(base: dict[str, Tensor], layout: Layout) -> None:
    """Bring the base factors of the experts of one parameter, which are stored together, to one rank by zeros."""
    most: dict[str, int] = {}
    experts = [(a, name) for a in layout.adapters if a.key_A in base and (name := parameter_of(a.module)) is not None]
    for a, name in experts:
        most[name] = max(most.get(name, 0), base[a.key_A].shape[0])
    for a, name in experts:
        A, B = base[a.key_A], base[a.key_B]
        if (lacking := most[name] - A.shape[0]) > 0:
            base[a.key_A] = torch.cat([A, A.new_zeros(lacking, *A.shape[1:])])
            base[a.key_B] = torch.cat([B, B.new_zeros(B.shape[0], lacking, *B.shape[2:])], 1)


def _cut(combined: Combined) -> Combined:
    """The result with zeros beyond the ranks that adapters keep."""
    A, B, base = combined.A, combined.B, combined.base
    if combined.ranks is not None:
        A, B = _keep(A, B, combined.ranks)
    if base is not None and combined.base_ranks is not None:
        base = _keep(*base, combined.base_ranks)
    return Combined(A, B, base)


def _keep(A: Tensor, B: Tensor, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    kept = torch.arange(A.shape[1], device=A.device) < torch.tensor(ranks, device=A.device)[:, None]
    return A * kept[:, :, None], B * kept[:, None]


def _stacks(round: Round) -> Iterator[tuple[Sequence[Adapter], Tensor, Tensor]]:
    """Some adapters of one shape at a time: they, A (G, N, r, d_in) and B (G, N, d_out, r), rows of zero up to rank r."""
    for group in round.layout.groups:
        a = group.adapters[0]
        dtype = working_dtype(a.dtype)
        size = max(1, _ENTRIES // (len(round.clients) * a.rank * (a.d_in + a.d_out)))
        for start in range(0, len(group.adapters), size):
            part = group.adapters[start : start + size]
            device = round.clients[0].device
            N, G = len(round.clients), len(part)
            A = torch.zeros(G, N, a.rank, a.d_in, dtype=dtype, device=device)
            # Columns of all clients side by side, as products of all clients take them.
            B = torch.zeros(G, a.d_out, N, a.rank, dtype=dtype, device=device).transpose(1, 2)
            for g, adapter in enumerate(part):
                for n, client in enumerate(round.clients):
                    A_n, B_n = (client[key].detach().flatten(1) for key in (adapter.key_A, adapter.key_B))
                    A[g, n, : len(A_n)] = A_n
                    B[g, n, :, : len(A_n)] = B_n
                    if (s := round.scalings) is not None:
                        B[g, n] *= s.per_client[n][adapter.module] / s.result[adapter.module]
            yield part, A, B


def _errors(A: Tensor, B: Tensor, w: Tensor, combined: Combined, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """‖Σ wᵢBᵢAᵢ − result‖_F and ‖Σ wᵢBᵢAᵢ‖_F, in float64: differences of Gram matrices lose half the digits."""
    S_A, S_B = stacked(A.double(), B.double(), w.double())
    results = [(combined.A.to(dtype), combined.B.to(dtype)), *([combined.base] if combined.base else [])]
    left = torch.cat([S_B, *(-B_result.double() for _, B_result in results)], dim=2)
    right = torch.cat([S_A, *(A_result.double() for A_result, _ in results)], dim=1)
    return product_norm(left, right).tolist(), product_norm(S_B, S_A).tolist()


def stacked(A: Tensor, B: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """S_A (G, N·r, d_in) and S_B (G, d_out, N·r) with S_B S_A = Σ wᵢBᵢAᵢ, the weights' roots on both."""
    root = w.sqrt()[:, None, None]
    return (root * A).flatten(1, 2), (root * B).transpose(1, 2).flatten(2)
