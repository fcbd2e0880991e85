"""The tensor-level operations as the kernels compute them: equal shapes in any number of batch dimensions."""

import pytest
import torch

from fedrot_kernels import reference
from fedrot_kernels.triton_backend.batches import cross_covariance, procrustes, rotate_average

from ..spectra import orthogonality
from .cases import BOTH_MODELS, DEVICE, DTYPES, assert_as_accurate, random, rotations, rounding, shares

pytestmark = pytest.mark.parametrize("triton_device", BOTH_MODELS, indirect=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("d", [33, 5])  # square frames look the same transposed
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_averages(dtype, d, batch, transposed):
    n, r = 3, 5
    F, F_ref = random(n, *batch, r, d, dtype=dtype), random(*batch, r, d, dtype=dtype, seed=1)
    given, given_ref = (x.mT.contiguous().mT if transposed else x for x in (F.to(DEVICE), F_ref.to(DEVICE)))
    M = cross_covariance(given, given_ref)
    assert M.shape == (n, *batch, r, r) and M.dtype == torch.float32
    theirs, exact = (F.to(x) @ F_ref.to(x).mT for x in (torch.float32, torch.float64))
    assert_as_accurate(M, theirs, exact, rounding(d) * (F.double().abs() @ F_ref.double().mT.abs()))

    count = F[..., 0, 0].numel()
    R, w = rotations(count, r).reshape(*F.shape[:-1], r), shares([1.0, 0.0, 2.0])
    mean = rotate_average(given, R.to(DEVICE), torch.tensor([3.0, 0.0, 6.0], device=DEVICE))
    assert mean.shape == F.shape[1:] and mean.dtype == torch.float32
    theirs, exact = (torch.tensordot(w.to(x), R.to(x).mT @ F.to(x), 1) for x in (torch.float32, torch.float64))
    magnitude = torch.tensordot(w, R.double().abs().mT @ F.double().abs(), 1)
    assert_as_accurate(mean, theirs, exact, rounding(n * r) * magnitude)


@pytest.mark.parametrize(("r", "strength"), [(r, strength) for r in (1, 3, 8) for strength in (0.0, 0.5, 1.0)] + [(33, 1.0)])
def test_procrustes(strength, r):
    M = random(*((1, 2) if r > 32 else (2, 3)), r, r).to(DEVICE)
    R, residual, undetermined = procrustes(M, strength=strength, reflections=False, floor=0.0)
    assert R.shape == M.shape and residual.shape == undetermined.shape == M.shape[:-2]
    assert orthogonality(R.cpu()) <= 1e-6 and residual.max() <= 1e-6
    if strength == 0:
        assert torch.equal(R.cpu(), torch.eye(r).expand(M.shape))
    for m, ours in zip(M.cpu().double().reshape(-1, r, r), R.cpu().reshape(-1, r, r), strict=True):
        truth = reference.soften(reference.special_orthogonal(m), strength)
        assert (ours - truth).abs().max() <= 1e-3  # the same rotation; its accuracy is tested where M is well conditioned
