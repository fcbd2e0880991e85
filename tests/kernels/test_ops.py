"""The tensor-level operations as PyTorch's dispatcher and compiler see them."""

import pytest
import torch

import fedrot_kernels as fk


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


OPERATIONS = {
    "cross_covariance": lambda dtype: (random(3, 2, 4, 33, dtype=dtype), random(2, 4, 33, dtype=dtype)),
    "procrustes": lambda dtype: (random(5, 4, 4, dtype=dtype), 0.5, False, 1e-5),
    "rotate_average": lambda dtype: (random(3, 2, 4, 33, dtype=dtype), fk.polar(random(3, 2, 4, 4)), torch.ones(3)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_registered_as_torch_asks(name, dtype):
    torch.library.opcheck(getattr(torch.ops.fedrot, name), OPERATIONS[name](dtype))


@pytest.mark.parametrize("F", [torch.zeros(0, 4, 4), torch.zeros(2, 0, 3, 3, dtype=torch.float64)])
def test_empty_batches_are_registered_too(F):
    torch.library.opcheck(torch.ops.fedrot.procrustes, (F, 1.0, True, 0.0))


def test_the_compiler_does_not_break_on_them():
    def aligned_mean(F, F_ref, weights):
        R = fk.polar(fk.cross_covariance(F, F_ref))
        return fk.rotate_average(F, R, weights), fk.procrustes(R, strength=0.5, reflections=False)[1]

    arguments = random(3, 2, 4, 33), random(2, 4, 33), torch.tensor([1.0, 2.0, 0.5])
    compiled = torch.compile(aligned_mean, fullgraph=True, backend="aot_eager")
    (mean, residual), (expected_mean, expected_residual) = compiled(*arguments), aligned_mean(*arguments)
    assert torch.equal(mean, expected_mean) and torch.equal(residual, expected_residual)


def test_gradients_stop_here():
    assert not fk.polar(random(2, 4, 4).requires_grad_()).requires_grad


@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_of_the_caller_changes_nothing(name):
    operation, arguments = getattr(torch.ops.fedrot, name), OPERATIONS[name](torch.float32)
    expected = torch.utils._pytree.tree_leaves(operation(*arguments))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.utils._pytree.tree_leaves(operation(*arguments))
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_the_callers_tf32_is_off_inside_and_on_again_after():
    given = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        seen = []
        fk.full_precision(lambda: seen.append(torch.get_float32_matmul_precision()))()
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(given)
