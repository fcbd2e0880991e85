"""The means of padded clients, from rectangular matrices in float64."""

import torch

from fedrot_kernels import reference as oracle

from ..dense import SHARES, matrices
from ..peft_models import factor_keys


def polar(M):
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def partial_isometry(A, B, A_ref, B_ref, on, reflections, strength):
    """R (rᵢ, r) from rectangular matrices, by SVD in float64."""
    M_A, M_B = A @ A_ref.T, B.T @ B_ref
    M = {"A": M_A, "B": M_B, "joint": M_A / A_ref.square().sum() + M_B / B_ref.square().sum()}[on]
    if not M.any():  # says nothing, as B = 0 of a first round
        return torch.eye(*M.shape, dtype=M.dtype)
    square = M.shape[0] == M.shape[1]
    R = oracle.special_orthogonal(M) if square and not reflections else polar(M)
    return polar((1 - strength) * torch.eye(*R.shape, dtype=R.dtype) + strength * R)


def expected(clients, reference, scaling, on, reflections, strength, shares=SHARES):
    """Means and the rotations, per adapter; scaling: module → sᵢ/s of every client."""
    mean, rotations = {}, {}
    for keys in factor_keys(reference):
        A_ref, B_ref = matrices(reference, keys)
        total, rotations[keys[0]] = [0, 0], []
        for (client, _), share, s in zip(clients, shares, scaling(keys[0]), strict=True):
            A, B = matrices(client, keys)
            R = partial_isometry(A, s * B, A_ref, B_ref, on, reflections, strength)
            total = [total[0] + share * R.T @ A, total[1] + share * s * B @ R]
            rotations[keys[0]].append(R)
        for key, x in zip(keys, total, strict=True):
            mean[key] = x.reshape(reference[key].shape)
    return mean, rotations
