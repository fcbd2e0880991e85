"""Rotations of least error, and the Gram matrices that they are found by, against dense float64 arithmetic."""

import pytest
import torch

import fedrot_kernels as fk
from fedrot_kernels.groupwise import least_error
from fedrot_kernels.groupwise.gram import Grams

from .groups import SHARES, WEIGHTS, N, clients, lost
from .spectra import orthogonal


@pytest.mark.parametrize("uses", [0, 10**6], ids=["factors", "Gram matrices"])
def test_the_error_of_any_rotations_is_that_of_the_definition(uses):
    A, B, *_ = clients()
    same_rank = [0, 1]
    R = orthogonal(2 * N, 4, torch.Generator().manual_seed(1)).view(2, N, 4, 4)
    grams = Grams([A[i] for i in same_rank], [B[i] for i in same_rank], SHARES, uses)
    assert (grams.A.K is None) == (grams.B.K is None) == (uses == 0)
    found = (grams.at(R).error * grams.size).sqrt()
    update = (grams.update * grams.size).sqrt()
    for k, i in enumerate(same_rank):
        torch.testing.assert_close(
            update[k], torch.linalg.norm((SHARES[:, None, None] * B[i] @ A[i]).sum(0)), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(found[k], lost(A[i], B[i], R[k]), rtol=1e-12, atol=0)


def test_one_factor_by_its_gram_matrix_and_the_other_by_itself():
    (A,), (B,), *_ = clients(shapes=[(4, 2000, 4)])
    grams = Grams([A], [B], SHARES, 3)
    assert grams.A.K is not None and grams.B.K is None
    eye = torch.eye(4, dtype=torch.float64).expand(1, N, -1, -1)
    found = (torch.stack([grams.update, grams.at(eye).error]) * grams.size).sqrt().flatten()
    expected = torch.stack([torch.linalg.norm((SHARES[:, None, None] * B @ A).sum(0)), lost(A, B, eye[0])])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_gradient_is_that_of_the_definition():
    (A,), (B,), *_ = clients(shapes=[(4, 33, 20)])
    R = orthogonal(N, 4, torch.Generator().manual_seed(2))
    grams = Grams([A], [B], SHARES, 10**6)
    Z = least_error._gradient(grams, R[None], grams.at(R[None]))[0]
    X = torch.zeros_like(R, requires_grad=True)
    (lost(A, B, R @ torch.linalg.matrix_exp(X - X.mT)) ** 2).backward()
    expected = -2 * SHARES[:, None, None] * (Z - Z.mT) * grams.size
    torch.testing.assert_close(expected, X.grad, rtol=1e-10, atol=1e-10 * float(X.grad.max()))


@pytest.mark.parametrize("drift", [0.3, 1e-2, 1e-3])
def test_float32_keeps_the_digits_of_small_errors(drift):
    A, B, A_ref, B_ref = clients(drift=drift, dtype=torch.float32)
    found = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref)
    wide = [[x.double() for x in factor] for factor in (A, B)]
    exact = fk.align_together(*wide, WEIGHTS, A_ref=[x.double() for x in A_ref], B_ref=[x.double() for x in B_ref])
    # Without the centre it would be up to 2e-8.
    rounding = 5e-9 * exact.update_norm
    torch.testing.assert_close(found.update_norm, exact.update_norm, rtol=1e-6, atol=0)
    for i, (a, b) in enumerate(zip(*wide, strict=True)):
        error = lost(a, b, found.R[i].double())
        assert abs(float(found.error[i] - error)) <= 1e-5 * float(error) + float(rounding[i])
        assert float(error) <= (1 + 1e-5) * float(exact.error[i]) + float(rounding[i])


@pytest.mark.parametrize("scale", [1e-22, 1e20])
def test_float32_of_any_scale(scale):
    A, B, A_ref, B_ref = clients(dtype=torch.float32)
    first = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref)
    A, A_ref = ([scale * x for x in factors] for factors in (A, A_ref))
    scaled = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref)
    torch.testing.assert_close(scaled.error, scale * first.error, rtol=1e-3, atol=1e-6 * scale * float(first.update_norm[2]))


def test_rotations_of_least_error_are_a_minimum():
    """Among rotations nearby, drawn at random, none is better."""
    (A,), (B,), *_ = clients(shapes=[(4, 33, 20)], turned=False)
    grams = Grams([A], [B], SHARES, 10**6)
    R = torch.eye(4, dtype=torch.float64).expand(1, N, -1, -1)
    for _ in range(8):
        R = least_error.least_error_rotations(grams, R)
    least = float(lost(A, B, R[0]))
    generator = torch.Generator().manual_seed(0)
    for size in (0.3, 0.03, 0.003):
        for _ in range(50):
            X = size * torch.randn(N, 4, 4, dtype=torch.float64, generator=generator)
            near = R[0] @ torch.linalg.matrix_exp(X - X.mT)
            assert float(lost(A, B, near)) > least * (1 - 1e-9)


def test_where_clients_agree_already_least_error_begins_with_them_as_they_came():
    A, B, A_ref, B_ref = clients(drift=0.01, turned=False)
    found = fk.align_together(A, B, WEIGHTS, A_ref=A_ref, B_ref=B_ref)
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        eye = torch.eye(a.shape[1], dtype=torch.float64)
        # Squared errors are known to the rounding of the squared update.
        rounding = 1e-15 * float(found.update_norm[i]) ** 2
        assert float(found.error[i]) ** 2 <= float(lost(a, b, eye)) ** 2 + rounding
