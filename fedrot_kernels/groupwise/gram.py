"""Gram space: all that alignment needs to know of clients' factors are the products AᵢAⱼᵀ and BᵢᵀBⱼ.

With K_A = S_A S_Aᵀ, S_A = [A₁; …; A_N], and K_B likewise, the cross-covariance with any weighted mean, the aggregation
error of any transformed factors and its gradient are products of K_A and K_B with matrices of r columns. Everything is
float64: errors are small differences of large inner products, of which float32 would keep half the digits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_COLUMNS = 256  # of the mean update formed at a time


class Products:
    """W ↦ K W with K = S Sᵀ, of one factor of G adapters from n clients: by K itself, or by S where K costs more.

    Args:
        frames: per adapter the clients' frames: n × (r, d).
        uses: how often K will be applied, about.
    """

    def __init__(self, frames: Sequence[Sequence[Tensor]], uses: int):
        (n, r), d = (len(frames[0]), frames[0][0].shape[0]), max(F[0].shape[1] for F in frames)
        self.n, self.r = n, r
        rows = n * r
        # Flops, those of skinny products twice, which wait for memory.
        explicit = rows * d + uses * rows * r <= 4 * uses * r * d
        self.K: Tensor | None = None
        self.S: list[Tensor] = []
        if explicit:
            self.K = torch.stack([(S := _stacked(F)) @ S.mT for F in frames])
            squares = self.K.diagonal(dim1=1, dim2=2)
        else:
            self.S = [_stacked(F) for F in frames]
            squares = torch.stack([S.square().sum(1) for S in self.S])
        self.squares = squares.unflatten(1, (n, r)).sum(2)
        """(G, n), ‖Fᵢ‖²."""

    def __call__(self, W: Tensor) -> Tensor:
        """(G, n, r, k), Fᵢ Σⱼ FⱼᵀWⱼ for W (G, n, r, k)."""
        flat = W.flatten(1, 2)
        if self.K is not None:
            # K is symmetric, and (WᵀK)ᵀ takes half the time of K W.
            return torch.bmm(flat.mT, self.K).mT.unflatten(1, (self.n, self.r))
        return torch.stack([S @ (S.mT @ w) for S, w in zip(self.S, flat, strict=True)]).unflatten(1, (self.n, self.r))

    def scale_(self, factor: Tensor) -> None:
        """S ← √factor S, factor (G,)."""
        self.squares = self.squares * factor[:, None]
        if self.K is not None:
            self.K *= factor[:, None, None]
        for S, c in zip(self.S, factor.sqrt(), strict=True) if self.S else ():
            S *= c


class Grams:
    """The Gram matrices of G adapters of one rank from n clients, the factors scaled to Σ wᵢ‖Aᵢ‖² = Σ wᵢ‖Bᵢ‖² = 1.

    Args:
        A: per adapter n × (r, d_in).
        B: per adapter n × (d_out, r).
        shares: (n,) float64, summing to 1; a client of weight 0 can be asked about, such as a reference.
        uses: how often the products will be applied, about.

    Attributes:
        A, B: ``Products``.
        w: (n, 1, 1).
        size: (G,), Σ wᵢ‖Aᵢ‖² Σ wᵢ‖Bᵢ‖² of the factors as they came: what squared errors here are in units of.
        update: (G,), ‖Σ wᵢBᵢAᵢ‖², in those units.
    """

    def __init__(self, A: Sequence[Sequence[Tensor]], B: Sequence[Sequence[Tensor]], shares: Tensor, uses: int):
        self.w = shares[:, None, None]
        self.A = Products(A, uses)
        self.B = Products([[x.mT for x in of_clients] for of_clients in B], uses)
        scales = []
        for products in (self.A, self.B):
            scale = products.squares @ shares
            products.scale_(1 / torch.where(scale > 0, scale, 1))
            scales.append(scale)
        self.size = scales[0] * scales[1]
        self.update = self._update(shares)

    def _update(self, shares: Tensor) -> Tensor:
        n, r = self.A.n, self.A.r
        if self.A.K is not None and self.B.K is not None:
            blocks = (self.A.K * self.B.K).unflatten(2, (n, r)).unflatten(1, (n, r)).sum((2, 4))
            return torch.einsum("gij,i,j->g", blocks, shares, shares)
        return torch.stack([self._norm(g, shares.repeat_interleave(r)) for g in range(len(self.size))])

    def _norm(self, g: int, rows: Tensor) -> Tensor:
        """‖Σ wᵢBᵢAᵢ‖² of adapter g, a few columns at a time."""
        K_A, K_B = self.A.K, self.B.K
        if K_A is not None or K_B is not None:  # one factor's Gram matrix, and the other's factors
            K, S = (K_A, self.B.S) if K_A is not None else (K_B, self.A.S)
            assert K is not None
            weighted = rows[:, None] * S[g]
            return (weighted * (K[g] @ weighted)).sum()
        S_A, S_B = self.A.S[g], rows[:, None] * self.B.S[g]
        return torch.stack([(S_B.mT @ columns).square().sum() for columns in S_A.split(_COLUMNS, dim=1)]).sum()

    def at(self, G: Tensor, H: Tensor) -> "Means":
        """The means of HᵢAᵢ and BᵢGᵢ, G and H (G, n, r, r) with HᵢGᵢ = I."""
        W_A, W_B = self.w * H.mT, self.w * G
        P, Q = self.A(W_A), self.B(W_B)
        a, b = (W_A.mT @ P).sum(1), (W_B.mT @ Q).sum(1)
        lost = (a * b).sum((1, 2)) - 2 * (self.w * P * Q).sum((1, 2, 3))
        return Means(P, Q, a, b, self.update + lost)


@dataclass
class Means:
    """What is known of Ā = Σ wᵢHᵢAᵢ and B̄ = Σ wᵢBᵢGᵢ.

    Attributes:
        P, Q: (G, n, r, r), AᵢĀᵀ and BᵢᵀB̄.
        a, b: (G, r, r), ĀĀᵀ and B̄ᵀB̄.
        error: (G,), ‖Σ wᵢBᵢAᵢ − B̄Ā‖², as ‖Σ wᵢBᵢAᵢ‖² + ⟨ĀĀᵀ, B̄ᵀB̄⟩ − 2 Σ wᵢ⟨BᵢᵀB̄, AᵢĀᵀ⟩, since BᵢGᵢHᵢAᵢ is BᵢAᵢ.
            Rounding may leave it negative where it is zero.
    """

    P: Tensor
    Q: Tensor
    a: Tensor
    b: Tensor
    error: Tensor

    def where(self, chosen: Tensor, other: "Means") -> "Means":
        """These where chosen (G,), the other's elsewhere."""
        pairs = ((self.P, other.P), (self.Q, other.Q), (self.a, other.a), (self.b, other.b), (self.error, other.error))
        return Means(*(select(chosen, x, y) for x, y in pairs))


def select(chosen: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x where chosen (G,), y elsewhere, both (G, …)."""
    return torch.where(chosen.reshape(-1, *[1] * (x.dim() - 1)), x, y)


def _stacked(frames: Sequence[Tensor]) -> Tensor:
    """(n·r, d) in float64."""
    return torch.cat([F.detach().double() for F in frames])
