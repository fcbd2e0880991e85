"""The baselines do what fedrot does: on the workloads' updates they agree in float64."""

import pytest
import torch

import fedrot
import fedrot_kernels as fk

from . import baselines
from .workloads import WORKLOADS, build

CPU = torch.device("cpu")


@pytest.fixture(params=list(WORKLOADS))
def inputs(request):
    return build(WORKLOADS[request.param][-1].shrunk(), CPU, torch.float64)


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-10 * value.abs().max()), key


def state_dict(inputs, A, B):
    keys = [adapter.keys for adapter in inputs.workload.adapters]
    return {key: x for pair in zip(keys, A, B, strict=True) for key, x in zip(pair[0], pair[1:], strict=True)}


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_everything_that_aligns(inputs, strength):
    expected = baselines.published(inputs.separate, inputs.weights, inputs.reference, strength)
    A, B = inputs.stacked_factors
    A_ref, weights = inputs.reference_A, torch.tensor(inputs.weights)
    assert_alike(state_dict(inputs, *baselines.batched_svd(A, B, inputs.weights, A_ref, strength)), expected)
    for updates in (inputs.separate, inputs.slabs):
        result = fedrot.aggregate(updates, inputs.weights, inputs.reference, align_on="A", strength=strength)
        assert_alike(result.state_dict, expected)
    for A, B in (inputs.factors(inputs.separate), inputs.factors(inputs.slabs), inputs.stacked_factors):
        aligned = fk.align_average(A, B, weights, A_ref=A_ref, strength=strength)
        assert_alike(state_dict(inputs, aligned.A, aligned.B), expected)


def test_plain_averages(inputs):
    expected = fedrot.aggregate(inputs.separate, inputs.weights, method="fedit").state_dict
    assert_alike(baselines.dictionary_loop(inputs.separate, inputs.weights), expected)
    assert_alike(baselines.foreach_average(inputs.slabs, inputs.weights), expected)
    assert_alike(baselines.stacked_average(inputs.stacked, inputs.weights), expected)
    means, _ = fk.average(list(inputs.stacked.values()), torch.tensor(inputs.weights))
    assert_alike(dict(zip(inputs.stacked, means, strict=True)), expected)


def test_alignment_matters_on_these_updates(inputs):
    plain = baselines.dictionary_loop(inputs.separate, inputs.weights)
    aligned = baselines.published(inputs.separate, inputs.weights, inputs.reference, 1.0)
    assert all((plain[key] - x).norm() > 0.05 * x.norm() for key, x in aligned.items())


def test_condition_numbers_are_those_of_client_updates(inputs):
    for adapter in inputs.workload.adapters:
        S = torch.linalg.svdvals(inputs.stacked[adapter.keys[0]] @ inputs.reference[adapter.keys[0]].T)
        condition = S[:, 0] / S[:, -1]
        assert condition.min() >= 1 and condition.max() < 8
