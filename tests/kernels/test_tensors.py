"""Tensors read through DLPack: where they lie, what they have in common, and what the library does not take."""

import pytest
import torch
from torch.nn import Parameter

import fedrot_kernels as fk
from fedrot_kernels.checks import all_finite, find_zeros
from fedrot_kernels.native_backend import library
from fedrot_kernels.native_backend.tensors import read_tensors

pytestmark = pytest.mark.skipif(
    library.instruction_set() is None, reason="the compiled library is not built, or switched off"
)
HERE = library.instruction_set()
SETS = () if HERE is None else library.INSTRUCTION_SETS[: library.INSTRUCTION_SETS.index(HERE) + 1]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def freed(x):
    """Free the memory of a tensor, as FSDP does between layers."""
    x.untyped_storage().resize_(0)
    return x


def test_tensors_lie_where_pytorch_says():
    memory = torch.randn(100)
    tensors = [memory, memory[3:7], Parameter(torch.ones(2, 3)), torch.zeros(4, requires_grad=True), torch.tensor(1.5)]
    table = read_tensors(tensors)
    assert list(table.addresses) == [x.data_ptr() for x in tensors]
    assert table.describe(1) == (True, True)


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        (torch.zeros(2, 6), True),
        (torch.zeros(6, 2), False),
        (torch.zeros(12), False),
        (torch.zeros(2, 6, dtype=torch.float64), False),
        (torch.zeros(2, 6, dtype=torch.int32), False),
        (torch.zeros(6, 2).mT, False),
        (torch.zeros(2, 2, 3), False),
    ],
    ids=lambda x: str(tuple(x.shape)) if isinstance(x, torch.Tensor) else str(x),
)
def test_tensors_are_alike_in_shape_dtype_and_layout(other, alike):
    first = torch.zeros(2, 6)
    table = read_tensors([first, first.clone(), other])
    assert table.describe(3)[0] is alike
    assert table.describe(1)[0]
    assert (read_tensors([first]).kinds == read_tensors([other]).kinds) is alike


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.zeros(3).as_subclass(type("Own", (torch.Tensor,), {})),
        lambda: freed(torch.zeros(3)),
    ],
    ids=["sparse", "meta", "subclass", "freed"],
)
def test_what_has_no_memory_of_its_own_is_not_read(make):
    assert read_tensors([torch.zeros(3), make()]) is None


def test_only_contiguous_floating_point_tensors_are_plain():
    for x in (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.complex64), torch.zeros(6)[::2]):
        assert not read_tensors([x]).describe(1)[1]
    assert read_tensors([torch.zeros(1, 6)[:, :3].expand(1, 3), torch.empty(0, 4)]).describe(1)[1]


@pytest.mark.parametrize("library_is_there", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_and_zero_tensors_are_found_with_and_without_the_library(dtype, library_is_there, monkeypatch):
    if not library_is_there:
        monkeypatch.setattr("fedrot_kernels.checks.read_tensors", lambda _: None)
    for size in (1, 7, 64, 4097, 10_000):
        x = torch.zeros(size, 3, dtype=dtype)
        assert find_zeros([x, -x, x + 1]) == [0, 1] and bool(all_finite([x, -x]))
        for value in (float("nan"), float("inf"), -float("inf")):
            wrong = x.clone()
            wrong[-1, -1] = value
            assert not bool(all_finite([x, wrong])) and find_zeros([wrong, x]) == [1]
        largest = torch.full((size, 3), torch.finfo(dtype).max, dtype=dtype)
        smallest = torch.full((size, 3), torch.finfo(dtype).smallest_normal, dtype=dtype) / 4
        assert bool(all_finite([largest, -largest, smallest])) and find_zeros([smallest, largest]) == []


def test_views_whose_sign_is_a_flag_are_read_with_it():
    """As parts of a conjugate are: DLPack exports their memory and not the flag."""
    imaginary = torch.complex(torch.ones(2, 3), torch.full((2, 3), 4.0)).conj().imag
    flagged = torch._neg_view(torch.full((2, 3), 4.0))
    assert imaginary.is_neg() and flagged.is_neg() and flagged.is_contiguous()
    B = [torch.ones(5, 2)] * 2
    for x in (imaginary, flagged):
        assert read_tensors([x]) is None
        found = fk.average_factors([[x, torch.zeros(2, 3)]], [B], [3.0, 1.0])
        assert torch.equal(found.A[0], torch.full((2, 3), -3.0))


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype, instructions):
    for size in (1, 15, 67, 300):
        x = torch.linspace(-3, 3, size, dtype=torch.float64).to(dtype)
        assert read_tensors([x, x[1:]]).is_finite(instructions)
        for place in range(size):
            wrong = x.clone()
            wrong[place] = (float("nan"), float("inf"), -float("inf"))[place % 3]
            assert not read_tensors([x, wrong]).is_finite(instructions)
            assert read_tensors([x, wrong[:place], wrong[place + 1 :]]).is_finite(instructions)
