"""Each tensor-level operation alone, grouped by operation: ``pytest benchmarks``, on a GPU where there is one.

The matrices are those of roberta-large (r 4) and llama-qv (r 16), so are the factors; ranks 8 to 128 for polar.
"""

import pytest
import torch

import fedrot_kernels as fk

from .workloads import WORKLOADS, build, does_not_fit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FACTORS = [(4, 10, 1024), (8, 10, 4096), (16, 10, 4096), (32, 10, 4096)]  # r, N, d
MODELS = {w.label: w for w in (WORKLOADS["roberta-large"][1], WORKLOADS["llama-qv"][0])}
# Fewer at high rank, where on two CPU cores 480 SVDs take 0.3 s (r = 64) and 1 s (r = 128).
BATCHES = [(4, 480), (8, 480), (16, 480), (32, 480), (64, 48), (128, 48)]  # r, matrices


pytestmark = pytest.mark.benchmark(min_rounds=3, max_time=0.5)


def timed(benchmark, group, call):
    benchmark.group = f"{group}, {DEVICE.type}"

    def finished():
        result = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    finished()  # compiles
    benchmark(finished)


def near_identity(r, count):
    generator = torch.Generator(DEVICE).manual_seed(r)
    return torch.eye(r, device=DEVICE) + 0.4 * torch.randn(count, r, r, device=DEVICE, generator=generator) / r**0.5


@pytest.fixture
def factor(request):
    r, N, d = request.param
    generator = torch.Generator(DEVICE).manual_seed(r)
    return torch.randn(N, r, d, device=DEVICE, generator=generator) / d**0.5


@pytest.mark.parametrize("factor", FACTORS, indirect=True, ids=str)
def test_cross_covariance(benchmark, factor):
    timed(benchmark, "cross_covariance", lambda: fk.cross_covariance(factor, factor[0]))


@pytest.mark.parametrize("factor", FACTORS, indirect=True, ids=str)
def test_rotate_average(benchmark, factor):
    R = fk.polar(near_identity(factor.shape[-2], len(factor)))
    weights = torch.arange(1.0, 1 + len(factor), device=DEVICE)
    timed(benchmark, "rotate_average", lambda: fk.rotate_average(factor, R, weights))


@pytest.mark.parametrize(("r", "matrices"), BATCHES)
@pytest.mark.parametrize("operation", ["polar", "procrustes", "svd"])
def test_rotation(benchmark, operation, r, matrices):
    M = near_identity(r, matrices)
    calls = {
        "polar": lambda: fk.polar(M),
        "procrustes": lambda: fk.procrustes(M, strength=0.5, reflections=True),
        "svd": lambda: torch.linalg.svd(M),
    }
    timed(benchmark, f"rotations of {matrices} matrices, r = {r}", calls[operation])


@pytest.mark.parametrize("layout", ["stacked", "slabs", "separate"])
@pytest.mark.parametrize("label", MODELS)
@pytest.mark.parametrize("operation", ["align_average", "average"])
def test_whole_model(benchmark, operation, label, layout):
    workload = MODELS[label]
    if reason := does_not_fit(workload, DEVICE, torch.float32):
        pytest.skip(reason)  # which says how much memory is wanted and how much there is
    inputs = build(workload, DEVICE, torch.float32)
    A, B = inputs.stacked_factors if layout == "stacked" else inputs.factors(getattr(inputs, layout))
    weights = torch.tensor(inputs.weights, device=DEVICE)
    calls = {
        "align_average": lambda: fk.align_average(A, B, weights, A_ref=inputs.reference_A, strength=0.5),
        "average": lambda: fk.average([*A, *B], weights),
    }
    timed(benchmark, f"{operation} of {label}", calls[operation])
