"""Gram space: the products AᵢAⱼᵀ and BᵢᵀBⱼ, which are all that alignment needs to know of clients' factors.

Let K_A = S_A S_Aᵀ with S_A = [A₁; …; A_N], and K_B likewise. The cross-covariance with any weighted mean, the aggregation
error of rotated factors and its gradient are products of K_A and K_B with matrices of r columns. All but the Gram matrices
of float32 factors (see ``centred``) is float64: errors are small differences of large inner products, and in float32 a
descent stalls.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .centred import Centred

_COLUMNS = 256  # columns of the mean update that are formed at a time


class Products:
    """The map W ↦ K W with K = S Sᵀ, of one factor of G adapters from n clients: by K itself, or by S where K costs more.

    Attributes:
        n: the number of clients.
        r: the rank.
        K: (G, n·r, n·r), or None where S is used.
        S: per adapter (n·r, d); empty where K is used.
        squares: (G, n), ‖Fᵢ‖².
    """

    def __init__(self, frames: Sequence[Sequence[Tensor]], uses: int, centred: Centred | None = None):
        """Form K or stack S, whichever makes the products cheaper.

        Args:
            frames: per adapter the clients' frames, n × (r, d).
            uses: about how often K will be applied.
            centred: what K is formed by in float32; None forms it in float64.
        """
        (n, r), d = (len(frames[0]), frames[0][0].shape[0]), max(F[0].shape[1] for F in frames)
        self.n, self.r = n, r
        rows = n * r
        # Flops; those of skinny products count twice, because they wait for memory.
        explicit = rows * d + uses * rows * r <= 4 * uses * r * d
        self.K: Tensor | None = None
        self.S: list[Tensor] = []
        if explicit:
            self.K = centred(frames) if centred else torch.stack([(S := _stack(F)) @ S.mT for F in frames])
            squares = self.K.diagonal(dim1=1, dim2=2)
        else:
            self.S = [_stack(F) for F in frames]
            squares = torch.stack([S.square().sum(1) for S in self.S])
        self.squares = squares.reshape(-1, n, r).sum(2)

    def __call__(self, W: Tensor) -> Tensor:
        """Fᵢ Σⱼ FⱼᵀWⱼ, (G, n, r, k), for W (G, n, r, k)."""
        flat = W.flatten(1, 2)
        if self.K is not None:
            # K is symmetric, and (WᵀK)ᵀ takes half the time of K W.
            return torch.bmm(flat.mT, self.K).mT.view(W.shape)
        return torch.stack([S @ (S.mT @ w) for S, w in zip(self.S, flat, strict=True)]).view(W.shape)

    def blocks(self) -> Tensor:
        """FᵢFᵢᵀ, (G, n, r, r)."""
        if self.K is not None:
            blocks: Tensor = self.K.view(-1, self.n, self.r, self.n, self.r).diagonal(dim1=1, dim2=3)
            return blocks.permute(0, 3, 1, 2)
        return torch.stack([(F := S.view(self.n, self.r, -1)) @ F.mT for S in self.S])

    def scale_(self, factor: Tensor) -> None:
        """Scale S by √factor, in place; factor (G,)."""
        self.squares = self.squares * factor[:, None]
        if self.K is not None:
            self.K *= factor[:, None, None]
        for S, c in zip(self.S, factor.sqrt(), strict=True) if self.S else ():
            S *= c


class Mean:
    """A mean F̄ = Σ FⱼᵀWⱼ that follows its weights one client at a time.

    Attributes:
        W: (G, n, r, k).
        sums: per adapter F̄ᵀ (d, k), where there is no Gram matrix.
    """

    def __init__(self, factor: Products, W: Tensor):
        self.factor, self.W = factor, W.clone()
        self.sums = [S.mT @ w for S, w in zip(factor.S, self.W.flatten(1, 2), strict=True)] if factor.S else []

    def products(self, i: int) -> Tensor:
        """FᵢF̄, (G, r, k)."""
        rows = slice(i * self.factor.r, (i + 1) * self.factor.r)
        if self.factor.K is not None:
            return torch.bmm(self.factor.K[:, rows], self.W.flatten(1, 2))
        return torch.stack([S[rows] @ x for S, x in zip(self.factor.S, self.sums, strict=True)])

    def add(self, i: int, D: Tensor) -> None:
        """Add D (G, r, k) to the weights of client i."""
        self.W[:, i] += D
        rows = slice(i * self.factor.r, (i + 1) * self.factor.r)
        if self.sums:  # which are kept where no Gram matrix is formed
            for S, x, d in zip(self.factor.S, self.sums, D, strict=True):
                x += S[rows].mT @ d

    def square(self) -> Tensor:
        """‖F̄‖², (G,)."""
        if self.sums:
            return torch.stack([x.square().sum() for x in self.sums])
        return (self.W * self.factor(self.W)).sum((1, 2, 3))


class Grams:
    """The Gram matrices of G adapters of one rank from n clients, the factors scaled to Σ wᵢ‖Aᵢ‖² = Σ wᵢ‖Bᵢ‖² = 1.

    Attributes:
        A: products with the Gram matrices of A.
        B: products with the Gram matrices of Bᵀ.
        w: (n, 1, 1), the weights.
        size: (G,), Σ wᵢ‖Aᵢ‖² Σ wᵢ‖Bᵢ‖² of the factors before scaling: the unit of squared errors here.
        update: (G,), ‖Σ wᵢBᵢAᵢ‖², in that unit.
    """

    def __init__(
        self,
        A: Sequence[Sequence[Tensor]],
        B: Sequence[Sequence[Tensor]],
        shares: Tensor,
        uses: int,
        centred: tuple[Centred, Centred] | tuple[None, None] = (None, None),
    ):
        """Compute the products of the factors.

        Args:
            A: per adapter n × (r, d_in).
            B: per adapter n × (d_out, r).
            shares: (n,) float64, summing to 1. A client of weight 0, such as a reference, has products but no influence.
            uses: about how often the products will be applied.
            centred: by what Gram matrices of A and B are formed in float32; None forms them in float64.
        """
        self.w = shares[:, None, None]
        self.A = Products(A, uses, centred[0])
        self.B = Products([[x.mT for x in clients] for clients in B], uses, centred[1])
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
            blocks = (self.A.K * self.B.K).view(-1, n, r, n, r).sum((2, 4))
            return torch.einsum("gij,i,j->g", blocks, shares, shares)
        return torch.stack([self._norm(g, shares.repeat_interleave(r)) for g in range(len(self.size))])

    def _norm(self, g: int, rows: Tensor) -> Tensor:
        """‖Σ wᵢBᵢAᵢ‖² of adapter g, a few columns at a time; rows (n·r,): each row's weight."""
        K_A, K_B = self.A.K, self.B.K
        for K, S in ((K_A, self.B.S), (K_B, self.A.S)):
            if K is not None:  # one factor's Gram matrix, and the other's factors
                weighted = rows[:, None] * S[g]
                return (weighted * (K[g] @ weighted)).sum()
        S_A, S_B = self.A.S[g], rows[:, None] * self.B.S[g]
        starts = range(0, S_A.shape[1], _COLUMNS)
        return torch.stack([(S_B.mT @ S_A[:, start : start + _COLUMNS]).square().sum() for start in starts]).sum()

    def at(self, R: Tensor) -> "Means":
        """Compute the products of the means of RᵢᵀAᵢ and BᵢRᵢ; R (G, n, r, r), orthogonal."""
        W = self.w * R
        P, Q = self.A(W), self.B(W)
        a, b = (W.mT @ P).sum(1), (W.mT @ Q).sum(1)
        lost = (a * b).sum((1, 2)) - 2 * (self.w * P * Q).sum((1, 2, 3))
        return Means(P, Q, a, b, self.update + lost)


@dataclass
class Means:
    """Products of Ā = Σ wᵢRᵢᵀAᵢ and B̄ = Σ wᵢBᵢRᵢ with the factors and each other.

    Attributes:
        P: (G, n, r, r), AᵢĀᵀ.
        Q: (G, n, r, r), BᵢᵀB̄.
        a: (G, r, r), ĀĀᵀ.
        b: (G, r, r), B̄ᵀB̄.
        error: (G,), ‖Σ wᵢBᵢAᵢ − B̄Ā‖² = ‖Σ wᵢBᵢAᵢ‖² + ⟨ĀĀᵀ, B̄ᵀB̄⟩ − 2 Σ wᵢ⟨BᵢᵀB̄, AᵢĀᵀ⟩, because BᵢRᵢRᵢᵀAᵢ is BᵢAᵢ. Rounding
            may leave it negative where it is zero.
    """

    P: Tensor
    Q: Tensor
    a: Tensor
    b: Tensor
    error: Tensor

    def where(self, chosen: Tensor, other: "Means") -> "Means":
        """Take these adapters where chosen (G,), the other's elsewhere."""
        pairs = ((self.P, other.P), (self.Q, other.Q), (self.a, other.a), (self.b, other.b), (self.error, other.error))
        return Means(*(select(chosen, x, y) for x, y in pairs))


def select(chosen: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Take x where chosen (G,), y elsewhere, both (G, …)."""
    return torch.where(chosen.reshape(-1, *[1] * (x.dim() - 1)), x, y)


def _stack(frames: Sequence[Tensor]) -> Tensor:
    """Stack n frames (r, d): (n·r, d) in float64."""
    return torch.cat([F.detach().double() for F in frames])
