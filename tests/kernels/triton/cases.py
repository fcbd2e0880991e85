"""What the kernels are tested on: numbers, where they lie in memory, and what rounding may cost."""

import torch

from ..spectra import orthogonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
# For ``triton_device``: each architecture in both models of its tensor cores.
BOTH_MODELS = ["card"] if GPU else [f"{a}, {m}" for a in ("sm_80", "sm_90") for m in ("rounding", "truncating")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANKS = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32)
EPS = torch.finfo(torch.float32).eps


def rounding(terms):
    """The rounding of a sum of products in float32, relative to Σ|xy|, for numbers whose signs are random.

    6 eps for each product. tf32x3 splits x into its 11 leading bits and a rest of 13 bits, of which it takes 11: it loses up
    to eps of x, as much of y, and the product of the two rests, 2⁻²² = 2 eps. (Executed, 4.0 eps is the most of 650,000
    products.) Weights and weighted rotations are rounded once each, which is half an eps, and a sum that is truncated, as in
    matrix units, loses up to one eps of a single product.

    The sum is a random walk: after k of K terms it is about √k of σ² and loses at most an ulp in each of K · 3/8 steps:
    three tf32 products, 8 terms at a time. That is eps σ² ΣK/8·3 √(8k/3) = K^1.5 eps σ²/4, of Σ|xy| = 0.64 K σ²: √K eps ·
    0.4 at most and half of it on average. Plain tf32 loses 5e-4/√K: 8 times twice this allowance at K = 512, 30 times at 64.
    """
    return (6 + terms**0.5 / 4) * EPS


def assert_as_accurate(ours, theirs, exact, allowance):
    """Entry by entry, error of ours ≤ error of theirs + 2 · allowance, the allowance being for float32 before the result
    is rounded to its dtype: twice, because at a tie of rounding that much decides which neighbour is taken."""
    ours = ours.cpu()
    assert ours.shape == exact.shape and ours.isfinite().all()
    error, error_of_theirs = (ours - exact).abs(), (theirs.to(ours.dtype) - exact).abs()
    excess = error - error_of_theirs - 2 * allowance
    assert (excess <= 0).all(), f"{excess.max():.2e} more than allowed, an error of {error.max():.2e}"


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shares(weights):
    w = torch.as_tensor(weights, dtype=torch.float64)
    return w / w.sum()


def rotations(n, r, seed=0):
    return orthogonal(n, r, torch.Generator().manual_seed(seed)).float()


LAYOUTS = ("stacked", "gaps", "separate", "slabs", "odd slabs", "transposed", "clients last")


def place(stacks, layout):
    """The clients (N, …) of each stack, laid out on the device; NaN lies around them wherever there is room.

    - stacked: contiguous; gaps: with a gap after every client.
    - separate: a tensor per client; slabs: all tensors of a client in one allocation; odd slabs: at odd places of it.
    - transposed, clients last: not contiguous.
    """
    if layout in ("slabs", "odd slabs"):
        return _slabs(stacks, odd=layout == "odd slabs")
    return [_place_one(x.to(DEVICE), layout) for x in stacks]


def _place_one(x, layout):
    if layout == "stacked":
        return x.contiguous()
    if layout == "gaps":
        memory = torch.full((len(x), x[0].numel() + 64), torch.nan, dtype=x.dtype, device=DEVICE)
        placed = memory[:, : x[0].numel()].unflatten(1, x.shape[1:])
        placed.copy_(x)
        return placed
    if layout == "separate":
        return [client.clone() for client in x]
    if layout == "transposed":
        return [client.mT.contiguous().mT for client in x]
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def _slabs(stacks, *, odd):
    sizes = [x[0].numel() for x in stacks]
    starts, end = [], 64
    for size in sizes:
        starts.append(end + 1 if odd else end)
        end += (size // 64 + 2) * 64
    slabs = [torch.full((end,), torch.nan, dtype=stacks[0].dtype, device=DEVICE) for _ in range(len(stacks[0]))]
    placed = [
        [slab[start : start + size].view(x.shape[1:]) for slab in slabs]
        for x, start, size in zip(stacks, starts, sizes, strict=True)
    ]
    for x, clients in zip(stacks, placed, strict=True):
        for client, values in zip(clients, x, strict=True):
            client.copy_(values)
    return placed


def untouched_between(means):
    """Whether the memory that averages share still holds NaN wherever none of them is."""
    memory = torch.zeros(0, dtype=means[0].dtype, device=DEVICE).set_(means[0].untyped_storage()).clone()
    for x in means:
        memory[x.storage_offset() : x.storage_offset() + x.numel()] = torch.nan
    return bool(memory.isnan().all())
