"""One client of a stream: the library's sums and rotations are PyTorch's, and what does not fit is refused."""

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels.native_backend import library

BACKENDS = ["torch", *(["native"] if library.instruction_set() else [])]
EPS = torch.finfo(torch.float32).eps


def client(r, d_in, d_out, G=3, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    A_ref, B_ref = ([torch.randn(*s, generator=g) for _ in range(G)] for s in ((r, d_in), (d_out, r)))
    A, B = ([(x + 0.2 * torch.randn(x.shape, generator=g)).to(dtype) for x in refs] for refs in (A_ref, B_ref))
    return A, B, A_ref, B_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 5, 3), (4, 100, 64), (7, 33, 40), (16, 130, 257)])
@pytest.mark.parametrize("on", ["A", "B", "AB"])
def test_both_backends_rotate_and_add_alike(shape, dtype, on):
    A, B, A_ref, B_ref = client(*shape, dtype=dtype)
    r, d_in, d_out = shape
    refs = {"A_ref": A_ref if "A" in on else None, "B_ref": B_ref if "B" in on else None}
    results = []
    for backend in BACKENDS:
        found = fk.find_rotations(A, B, **refs, strength=0.7, backend=backend)
        sums = torch.ones(3, r, d_in), torch.ones(3, d_out, r)
        sketches = fk.add_client_(*sums, A, B, found.R, 2.5, sketch_seed=4, backend=backend)
        for i in range(3):
            exact = 1 + 2.5 * found.R[i].double().mT @ A[i].double(), 1 + 2.5 * B[i].double() @ found.R[i].double()
            for total, truth in zip(sums, exact, strict=True):
                assert (total[i] - truth).abs().max() <= 8 * r * EPS * truth.abs().max()
        results.append((found.R, *sketches))
    for x, y in zip(results[0], results[-1], strict=True):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_any_layout_are_added_to(backend):
    A, B, _, _ = client(4, 20, 12)
    sums = torch.zeros(3, 20, 4).mT, torch.zeros(3, 4, 12, dtype=torch.float64).mT
    fk.add_client_(*sums, A, B, None, 3.0, backend=backend)
    for total, factors in zip(sums, (A, B), strict=True):
        assert torch.allclose(total.float(), 3 * torch.stack(factors))


def test_what_does_not_fit_is_refused():
    A, B, A_ref, _ = client(4, 20, 12)
    sums = torch.zeros(3, 4, 20), torch.zeros(3, 12, 4)
    for call, said in (
        (lambda: fk.add_client_(*sums, A, [x.bfloat16() for x in B], None, 1.0), "both must have one dtype"),
        (lambda: fk.add_client_(sums[0], sums[1][:, :6], A, B, None, 1.0), "sum_B is"),
        (lambda: fk.add_client_(*sums, A, B, torch.eye(2).expand(3, 2, 2), 1.0), "R is"),
        (lambda: fk.find_rotations(A, B, A_ref=[x[:, :5] for x in A_ref], B_ref=None), "A_ref is"),
        (lambda: fk.find_rotations(A, B[:2], A_ref=A_ref, B_ref=None), "one entry per adapter"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert not sums[0].any() and not sums[1].any()
