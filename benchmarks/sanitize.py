"""A few launches on small, odd and unaligned shapes, for compute-sanitizer: ``python -m benchmarks.sanitize``."""

import sys

import torch
from torch import Tensor

import fedrot_kernels as fk

CLIENTS = 3
# r, d_in, d_out of the adapters of a call: all are padded to its largest rank, which chooses the kernels.
MODELS = [
    [(4, 37, 129), (4, 64, 64), (1, 5, 3)],
    [(4, 64, 64)],
    [(16, 100, 255), (12, 33, 20)],
    [(32, 96, 64)],
    [(64, 96, 65), (4, 37, 129)],
    [(128, 40, 136)],
]


def unaligned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor that begins one element after a 16-byte boundary."""
    numel = torch.Size(shape).numel()
    return torch.randn(numel + 1, device=device).to(dtype)[1:].view(shape)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    weights = torch.arange(1.0, 1 + CLIENTS, device=device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shapes in MODELS:
            check(shapes, dtype, weights)


def check(shapes: list[tuple[int, int, int]], dtype: torch.dtype, weights: Tensor) -> None:
    """Align and average one model, from unaligned tensors and from stacked ones."""
    device = weights.device
    A = [[unaligned(r, d_in, dtype=dtype, device=device) for _ in range(CLIENTS)] for r, d_in, _ in shapes]
    B = [[unaligned(d_out, r, dtype=dtype, device=device) for _ in range(CLIENTS)] for r, _, d_out in shapes]
    A_ref, B_ref = [a[0].clone() for a in A], [b[0].clone() for b in B]
    stacked_A, stacked_B = [torch.stack(a) for a in A], [torch.stack(b) for b in B]
    for to_A, to_B in ((A_ref, None), (None, B_ref), (A_ref, B_ref)):
        for of_A, of_B in ((A, B), (stacked_A, stacked_B)):
            if not bool(fk.align_average(of_A, of_B, weights, A_ref=to_A, B_ref=to_B, strength=0.5).finite):
                sys.exit(f"align_average of {shapes} in {dtype} is not finite")
    if not bool(fk.average([*A, *B], weights)[1]):
        sys.exit(f"average of {shapes} in {dtype} is not finite")
    print(f"{dtype}: {shapes}", flush=True)


if __name__ == "__main__":
    main()
