"""Small kernels give what PyTorch gives, in every mode of execution."""

import pytest
import torch

from . import Settings, executed, kernels

pytestmark = pytest.mark.slow
HALVES = [torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def arch(request):
    return request.param


@pytest.fixture(params=["rounding", "truncating"])
def device(request, arch):
    with executed(arch, Settings(request.param)) as driver:
        yield driver


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both_orders(device, launch):
    """Run a launch that returns new tensors twice, CTAs and warps in reverse the second time: the same bits."""
    first = launch()
    device.settings = Settings(device.settings.tensor_cores, reverse=True)
    again = launch()
    device.settings = Settings(device.settings.tensor_cores)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    return first


@pytest.mark.parametrize("n", [1, 1000, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_sums_of_vectors(device, dtype, n):
    x, y = random(n, dtype=dtype), random(n, dtype=dtype, seed=1)

    def launch():
        out = torch.empty(n, dtype=dtype)
        kernels.add[(-(-n // 256),)](x, y, out, n, 256)
        return (out,)

    assert torch.equal(both_orders(device, launch)[0], x + y)


@pytest.mark.parametrize("warps", [1, 4, 8])
def test_reductions(device, warps):
    x = random(3, 512)

    def launch():
        out = torch.empty(3, 4)
        kernels.statistics[(3,)](x, out, 512, num_warps=warps)
        return (out,)

    (out,) = both_orders(device, launch)
    assert (out[:, 0] - x.sum(1)).abs().max() <= 512 * EPS * x.abs().max()
    assert torch.equal(out[:, 1:], torch.stack([x.amax(1), x.amin(1), x.argmax(1).float()], 1))


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(16, 16, 32, 1), (64, 16, 32, 4), (64, 64, 64, 4), (128, 32, 32, 8)])
@pytest.mark.parametrize("kind", [*HALVES, "tf32", "tf32x3", "ieee"])
def test_products(device, kind, shape, transposed):
    m, n, k, warps = shape
    dtype = kind if isinstance(kind, torch.dtype) else torch.float32
    precision = "ieee" if dtype != torch.float32 else kind
    x, y = random(m, k, dtype=dtype), random(k, n, dtype=dtype, seed=1)
    given = [a.mT.contiguous() if t else a for a, t in zip((x, y), transposed, strict=True)]

    def launch():
        out = torch.empty(m, n)
        kernels.product[(1,)](*given, out, m, n, k, min(k, 32), *transposed, precision, num_warps=warps, num_stages=1)
        return (out,)

    (out,) = both_orders(device, launch)
    magnitude = x.double().abs() @ y.double().abs()
    # Inputs to 11 bits; a dropped product of two low parts and their rounding; every addition of two numbers.
    allowed = {"tf32": 2**-10, "tf32x3": 4 * EPS}.get(kind, 0) + k * EPS
    assert ((out - x.double() @ y.double()).abs() <= allowed * magnitude).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_roundings_to_half_precision(device, dtype):
    x = torch.cat([random(1000), random(1000) * 1e-5, random(1000) * 1e4, torch.tensor([0.0, -0.0, 1 + 2**-9, 1 + 2**-12])])
    x = torch.cat([x, torch.tensor([65519.0, 65520.0, 3.4e38, torch.inf, -torch.inf, torch.nan]), torch.zeros(62)])
    out, back = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
    kernels.convert[(len(x) // 512,)](x, out, 512)
    kernels.convert[(len(x) // 512,)](out, back, 512)
    assert torch.equal(out[:3000], x[:3000].to(dtype))
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers(device, dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-(2**31), 2**31, (128,), dtype=torch.int64, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(8, 128, dtype=dtype)
    kernels.bits[(1,)](x, y, out, 128)
    n = y & 15
    minimum, maximum = torch.minimum(x, y), torch.maximum(x, -y)
    expected = [x >> n, x << n, (x & y) ^ (x | ~y), x * y]
    expected += [torch.div(x, n + 1, rounding_mode="trunc"), torch.fmod(x, n + 1), minimum - maximum, x.abs()]
    assert torch.equal(out, torch.stack(expected))


def test_loops_of_unequal_length(device):
    x = torch.arange(1, 20, dtype=torch.int32)
    largest, steps = torch.empty(19, dtype=torch.int32), torch.empty(19, dtype=torch.int32)
    kernels.collatz[(19,)](x, largest, steps, 19)
    for start, most, count in zip(x.tolist(), largest.tolist(), steps.tolist(), strict=True):
        seen = [start]
        while seen[-1] > 1:
            seen.append(3 * seen[-1] + 1 if seen[-1] % 2 else seen[-1] // 2)
        assert (max(seen), len(seen) - 1) == (most, count)
