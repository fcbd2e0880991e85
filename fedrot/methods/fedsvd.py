"""FedSVD (arXiv 2505.12805): clients train B only, and the server turns the mean B̄A into the next round's basis."""

import torch
from torch import Tensor

from fedrot_kernels import full_precision, widen

from ..adapters.layout import Layout
from ..adapters.values import check_range
from ..seeding import generator
from .ffa_lora import FFALoRA


class FedSVD(FFALoRA):
    """B̄A = UΣVᵀ; the next A is Vᵀ, whose rows are orthonormal, and the next B is UΣ. The product is the mean update.

    With Aᵀ = QR and K = B̄Rᵀ = UΣWᵀ, Vᵀ = WᵀQᵀ and UΣ = KW, so that B·A is B̄A to rounding however W is rounded. Rows of A
    stay orthonormal where B̄ has fewer than r directions; of r > d_in rows the last are zero.
    """

    name = "fedsvd"
    paper = "arXiv 2505.12805"
    down = "A, B"
    cost = "N r d_out + r² d"
    uses = frozenset({"seed"})
    supports_server_optimizer = False

    @full_precision
    def recast(self, mean: dict[str, Tensor], layout: Layout, round: int) -> dict[str, Tensor]:
        """See ``Method.recast``. UpdateError where the product overflows."""
        recast, numbers = dict(mean), generator(self.options.seed, round)
        for group in layout.groups:
            A, B = widen(group.A(mean)), widen(group.B(mean))
            # PEFT begins an embedding with A = 0, which has no row space. B·A is zero in any other one, too.
            empty = (A == 0).flatten(1).all(1)[:, None, None]
            drawn = torch.randn(A.shape, generator=numbers, dtype=A.dtype, device="cpu").to(A.device)
            A_new, B_new = to_orthonormal_rows(torch.where(empty, drawn, A), torch.where(empty, 0, B))
            for i, a in enumerate(group.adapters):
                for key, x in ((a.key_A, A_new[i]), (a.key_B, B_new[i])):
                    recast[key] = x.to(layout.specs[key].dtype, copy=True).reshape(layout.specs[key].shape)
        check_range({key: recast[key] for keys in layout.factor_keys for key in keys}, "the average,")
        return recast


def to_orthonormal_rows(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Vᵀ (G, r, d_in) and UΣ (G, d_out, r) of B·A = UΣVᵀ, for A (G, r, d_in) and B (G, d_out, r)."""
    Q, R = torch.linalg.qr(A.mT)
    K = B @ R.mT
    if not bool(K.isfinite().all()):  # the mean or its product overflows, which the SVD would not report by its name
        return torch.full_like(A, torch.nan), torch.full_like(B, torch.nan)
    W = torch.linalg.svd(torch.linalg.qr(K, mode="r").R).Vh.mT
    A_new, B_new = torch.zeros_like(A), torch.zeros_like(B)
    k = W.shape[-1]
    A_new[:, :k], B_new[:, :, :k] = (Q @ W).mT, K @ W
    return A_new, B_new
