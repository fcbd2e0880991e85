"""The aggregation error and the rotation angle against their definitions."""

import math

import pytest
import torch

from fedrot_kernels import aggregation_error, rotation_angle
from fedrot_kernels import reference as oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d_in", "d_out"), [(1, 64, 48), (3, 64, 48), (40, 64, 48), (40, 600, 20), (2, 5, 7)])
def test_the_aggregation_error_of_few_and_of_many_clients(n, d_in, d_out, dtype):
    generator = torch.Generator().manual_seed(n)
    A, B, w = (torch.randn(shape, generator=generator).double() for shape in ((n, 4, d_in), (n, d_out, 4), (n,)))
    w = w.square() / w.square().sum()
    errors, norms = aggregation_error(torch.stack([A, A]).to(dtype), torch.stack([B, 2 * B]).to(dtype), w)
    mean = torch.einsum("n,nor,nri->oi", w, B, A).norm().item()
    eps = 100 * torch.finfo(dtype).eps
    expected = oracle.aggregation_error(list(A), list(B), w.tolist()).item()
    assert norms.tolist() == pytest.approx([mean, 2 * mean], rel=eps)
    assert errors.tolist() == pytest.approx([expected, 2 * expected], abs=2 * eps * mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_angle_in_degrees(dtype):
    near_180 = 2 * math.degrees(math.sqrt(2 * torch.finfo(dtype).eps))  # where the arcsine is steepest
    for r in (1, 2, 3, 16):
        eye = torch.eye(r, dtype=dtype)
        assert rotation_angle(eye).item() == 0
        assert rotation_angle(torch.stack([eye, -eye])).tolist() == pytest.approx([0, 180], abs=near_180)
    for degrees in (1.0, 30.0, 90.0, 150.0, -90.0):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        assert rotation_angle(torch.tensor([[c, -s], [s, c]], dtype=dtype)).item() == pytest.approx(abs(degrees), rel=1e-4)
