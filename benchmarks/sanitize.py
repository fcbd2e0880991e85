"""A few launches on small, odd and unaligned shapes, for compute-sanitizer: ``python -m benchmarks.sanitize``."""

import sys

import torch
from torch import Tensor

import fedrot_kernels as fk

CLIENTS = 3
SHAPES = [(4, 37, 129), (4, 64, 64), (16, 100, 255), (64, 96, 65), (1, 5, 3)]  # r, d_in, d_out


def unaligned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor that begins one element after a 16-byte boundary."""
    numel = torch.Size(shape).numel()
    return torch.randn(numel + 1, device=device).to(dtype)[1:].view(shape)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    weights = torch.arange(1.0, 1 + CLIENTS, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        A = [[unaligned(r, d_in, dtype=dtype, device=device) for _ in range(CLIENTS)] for r, d_in, _ in SHAPES]
        B = [[unaligned(d_out, r, dtype=dtype, device=device) for _ in range(CLIENTS)] for r, _, d_out in SHAPES]
        A_ref, B_ref = [a[0].clone() for a in A], [b[0].clone() for b in B]
        stacked_A, stacked_B = [torch.stack(a) for a in A], [torch.stack(b) for b in B]
        for on, (to_A, to_B) in {"A": (A_ref, None), "B": (None, B_ref), "both": (A_ref, B_ref)}.items():
            for of_A, of_B in ((A, B), (stacked_A, stacked_B)):
                aligned = fk.align_average(of_A, of_B, weights, A_ref=to_A, B_ref=to_B, strength=0.5)
                if not bool(aligned.finite):
                    sys.exit(f"align_average in {dtype} on {on} is not finite")
            print(f"align_average, {dtype}, on {on}", flush=True)
        _, finite = fk.average([*A, *B], weights)
        if not bool(finite):
            sys.exit(f"average in {dtype} is not finite")
        print(f"average, {dtype}", flush=True)


if __name__ == "__main__":
    main()
