"""Run by the Python that a wheel was installed for: imports what was installed, calls every backend, compares the results.

Not a module of the tests: these are not installed there. Kernels run in Triton's interpreter, on CPU tensors.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

import fedrot
import fedrot_kernels

for package in fedrot, fedrot_kernels:
    assert Path(package.__file__).is_relative_to(sys.prefix), f"{package.__file__} is not the installed one"

backends = set(get_args(fedrot_kernels.Backend)) - ({"triton"} if sys.platform != "linux" else set())
if fedrot_kernels.backends()["native"].startswith("not"):
    backends.remove("native")
assert len(backends) >= 2, backends

generator = torch.Generator().manual_seed(0)
factors = [torch.randn(2, *shape, generator=generator) for shape in ((4, 24), (20, 4))]
reference = {f"base_model.model.layer.lora_{name}.weight": x[0] for name, x in zip("AB", factors, strict=True)}
clients = [{key: x + 0.1 * torch.randn(x.shape, generator=generator) for key, x in reference.items()} for _ in range(3)]
A, B = ([torch.stack([client[key] for client in clients])] for key in reference)
A_ref, B_ref = ([x] for x in reference.values())
weights = [1.0, 2.0, 4.5]


def results(backend: str) -> Iterable[tuple[str, Tensor]]:
    """Everything that a backend computes, by what computed it."""
    aligned = fedrot_kernels.align_average(A, B, weights, A_ref=A_ref, B_ref=B_ref, backend=backend)
    yield from ((f"align_average: {name}", getattr(aligned, name)[0]) for name in ("A", "B", "R"))
    means, finite = fedrot_kernels.average(A, weights, backend=backend)
    yield "average", means[0]
    yield "average: finite", finite.float()
    for method in ("fedit", "fedrot"):
        aggregated = fedrot.aggregate(clients, weights, reference, method=method, backend=backend)
        yield from ((f"aggregate by {method}: {key}", x) for key, x in aggregated.state_dict.items())


expected = dict(results("torch"))
for backend in sorted(backends):
    found = dict(results(backend))
    assert list(found) == list(expected)
    for what, x in expected.items():
        error = (found[what] - x).abs().max() / x.abs().max()
        assert error <= 1e-5, f"{what}: {backend} differs from torch by {error:.1e}"
print(f"{len(expected)} results agree between {', '.join(sorted(backends))}")
