"""The definitions of alignment and averaging in float64, one adapter at a time, and how near a result must come."""

import pytest
import torch

from fedrot_kernels import reference as oracle

from .peft_models import KINDS, factor_keys

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
WEIGHTS = [1.0, 2.0, 4.5]
SHARES = [w / 7.5 for w in WEIGHTS]
# Relative to a tensor's largest entry: what Newton-Schulz may lose beyond what an SVD in the same dtype loses.
ROUNDING = {torch.float32: 3e-6, torch.float64: 1e-12}


def working(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding(dtype):
    """Relative to a tensor's largest entry: one rounding of the output, and what computing it loses."""
    return torch.finfo(dtype).eps / 2 + ROUNDING[working(dtype)]


def factors(update, keys, dtype=torch.float64):
    A, B = (update[key].detach().to(dtype).flatten(1) for key in keys)
    return A, B


def expected_rotations(clients, reference, keys, on, reflections, strength, dtype=torch.float64):
    A_ref, B_ref = factors(reference, keys, dtype)
    rotations = []
    for A, B in (factors(client, keys, dtype) for client in clients):
        M_A, M_B = oracle.cross_covariance(A, A_ref), oracle.cross_covariance(B.T, B_ref.T)
        M = {"A": M_A, "B": M_B, "joint": M_A / A_ref.square().sum() + M_B / B_ref.square().sum()}[on]
        R = oracle.polar(M) if reflections else oracle.special_orthogonal(M)
        rotations.append(oracle.soften(R, strength))
    return rotations


def expected_mean(clients, weights, reference, on, reflections, strength, dtype=torch.float64):
    """The definitions, one adapter at a time; float64 is the truth, a lower dtype shows what plain torch loses."""
    total = sum(weights)
    mean = {key: sum(w / total * c[key].to(dtype) for w, c in zip(weights, clients, strict=True)) for key in clients[0]}
    for keys in factor_keys(reference):
        R = expected_rotations(clients, reference, keys, on, reflections, strength, dtype)
        A, B = zip(*(factors(client, keys, dtype) for client in clients), strict=True)
        mean[keys[0]] = oracle.rotate_average(A, R, weights).reshape(mean[keys[0]].shape)
        mean[keys[1]] = oracle.rotate_average([b.T for b in B], R, weights).T.reshape(mean[keys[1]].shape)
    return mean


def assert_same_bits(first, second):
    assert first and first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def assert_close(first, second):
    assert first and first.keys() == second.keys()
    for key, x in second.items():
        bound = 2 * rounding(x.dtype) * x.abs().max().double()
        assert (first[key].double() - x.double()).abs().max() <= bound, key
