"""Clients' tensors that were read once: the same averages as from lists of tensors, and the same refusals."""

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels.native_backend import library
from fedrot_kernels.native_backend.tensors import read_tensors

from .test_whole_model import model

pytestmark = pytest.mark.skipif(
    library.instruction_set() is None, reason="the compiled library is not built, or switched off"
)
SHAPES = [(4, 9, 30), (3, 17, 8), (4, 9, 30)]
WEIGHTS = [1.0, 0.0, 2.5]


def columns(A, B):
    """Columns of A and of B, whose tensors lie in another order in the clients' tables."""
    tables = [read_tensors([x for pair in zip(B, A, strict=True) for x in (pair[0][i], pair[1][i])]) for i in range(3)]
    L = len(A)
    return fk.TensorColumns(tables, [2 * i + 1 for i in range(L)]), fk.TensorColumns(tables, [2 * i for i in range(L)])


def test_columns_are_the_clients_tensors():
    A, B, *_ = ([[*clients] for clients in factors] for factors in model(SHAPES, 3, torch.float32, seed=1))
    of_A, of_B = columns(A, B)
    for given, found in ((A, of_A), (B, of_B)):
        assert [[x.data_ptr() for x in clients] for clients in found] == [[x.data_ptr() for x in c] for c in given]
        assert list(found.addresses()) == [x.data_ptr() for clients in given for x in clients]
        assert [x.data_ptr() for x in found.firsts] == [clients[0].data_ptr() for clients in given]
        assert found[-1][2] is given[-1][2] and found[1:] == [found[1], found[2]] and found.clients == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_columns_average_as_lists_do(dtype, backend):
    A, B, A_ref, B_ref = model(SHAPES, 3, dtype, seed=2)
    results = []
    for factors in ((A, B), columns(A, B)):
        aligned = fk.align_average(*factors, WEIGHTS, A_ref=A_ref, B_ref=B_ref, backend=backend, sketch_seed=0)
        averaged = fk.average_factors(*factors, WEIGHTS, backend=backend)
        together = fk.align_together(*factors, WEIGHTS, A_ref=A_ref, B_ref=B_ref, backend=backend)
        errors = fk.measure_errors(*factors, aligned.R, WEIGHTS, backend=backend)
        means = (x for found in (aligned, averaged, together) for x in (*found.A, *found.B))
        results.append([*means, *aligned.R, errors, aligned.estimates.numbers])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_columns_that_do_not_fit_are_refused():
    A, B, A_ref, _ = model(SHAPES, 3, torch.float32, seed=3)
    of_A, of_B = columns(A, B)
    assert fk.align_average(of_A, of_B, WEIGHTS, A_ref=A_ref).finite
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(ValueError, match=r"adapter 0: A_ref is \(4, 8\), but the clients have \(4, 9\)"):
            fk.align_average(of_A, of_B, WEIGHTS, A_ref=[A_ref[0][:, :8].clone(), *A_ref[1:]])
        with pytest.raises(ValueError, match=r"adapter 0: expected \(r, d_in\) and \(d_out, r\) per client"):
            fk.align_average(of_A, fk.TensorColumns(of_B._tables, [2, 0, 4]), WEIGHTS, A_ref=A_ref)
    with pytest.raises(ValueError, match="tables of tensors of one kind each"):
        fk.TensorColumns([read_tensors([torch.zeros(2)]), read_tensors([torch.zeros(3)])], [0])
