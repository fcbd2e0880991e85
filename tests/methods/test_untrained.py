"""Towards an untrained reference nothing rotates, whichever factor is aligned: the paper's first round."""

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

import fedrot

from ..peft_models import KINDS, client_updates, factor_keys, peft_model

ALIGN_ON = ["alternate", "A", "B", "joint"]


def fresh_adapter(kind):
    """As PEFT makes it: B is zero, or A in an embedding."""
    model = peft_model(kind)
    for module in model.modules():
        if hasattr(module, "reset_lora_parameters"):
            module.reset_lora_parameters("default", True)
    return {key: x.clone() for key, x in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("align_on", ALIGN_ON)
@pytest.mark.parametrize("name", ["linear", "embedding", "convolution", "bfloat16", "float64"])
def test_the_first_round_of_a_shared_start_is_plain_averaging(name, align_on):
    kind = KINDS[name]
    start, updates = fresh_adapter(kind), client_updates(kind, 3)
    assert all(start[a].any() != start[b].any() for a, b in factor_keys(start))
    plain = fedrot.aggregate(updates, [1, 2, 3], method="fedit").state_dict
    for method in ("fedrot", "fedrot-adaptive"):
        result = fedrot.aggregate(updates, [1, 2, 3], start, method=method, align_on=align_on, round=1)
        assert result.report.angle == 0 and result.report.target is None
        assert "nothing was rotated: the reference, or every client, is untrained" in str(result.report)
        for key, mean in plain.items():
            bound = 4 * torch.finfo(mean.dtype).eps * mean.abs().max()
            assert (result.state_dict[key] - mean).abs().max() <= bound, (method, key)
    streamed = fedrot.FedRotAggregator(start, align_on=align_on, round=1)
    for update in updates:
        streamed.add(update)
    assert streamed.finish().report.target is None
    aligned = fedrot.align(updates[0], start, align_on=align_on, round=1)
    assert all(torch.equal(aligned[key], x) for key, x in updates[0].items())


@pytest.mark.parametrize("align_on", ALIGN_ON)
def test_adapters_are_untrained_one_by_one(align_on):
    """Only the adapter whose reference has a factor of zero stays as it is."""
    kind = KINDS["linear"]
    reference, *updates = client_updates(kind, 4)
    fresh_A, fresh_B = factor_keys(reference)[0]
    reference[fresh_B] = torch.zeros_like(reference[fresh_B])
    result = fedrot.aggregate(updates, None, reference, align_on=align_on, strength=1.0)
    unrotated = [a for a in result.report.adapters if not any(a.angles)]
    assert len(unrotated) == 1 and unrotated[0].undetermined == 3 * unrotated[0].rank
    assert fresh_A.startswith(unrotated[0].module)
    assert result.report.target == "the reference"
    assert all(a.undetermined == 0 for a in result.report.adapters if a is not unrotated[0])
    for method, expected in (("fedit", True), ("fedrot-consensus", False)):  # which needs no reference
        other = fedrot.aggregate(updates, None, reference, method=method, strength=1.0).state_dict
        assert torch.allclose(other[fresh_A], result.state_dict[fresh_A], atol=1e-6) == expected


def test_a_single_entry_makes_a_reference_a_trained_one():
    """In a row that is not the first, and as small as a float32 can be."""
    kind = KINDS["linear"]
    reference, *updates = client_updates(kind, 3)
    _, key_B = factor_keys(reference)[0]
    reference[key_B] = torch.zeros_like(reference[key_B])
    reference[key_B][-1, -1] = -1e-40
    report = fedrot.aggregate(updates, None, reference, align_on="A").report
    assert report.undetermined == 0 and all(a.angles[0] > 0 for a in report.adapters)


def adapters(r, seed, d_out=10, zero_B=False):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module in ("l0", "l1"):
        state[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, 12, generator=generator)
        state[f"base_model.model.{module}.lora_B.weight"] = torch.randn(d_out, r, generator=generator) * (not zero_B)
    return state


def config(r):
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=["l0", "l1"])


def test_padding_is_no_direction_of_a_client():
    updates, configs = [adapters(r, r) for r in (2, 4, 3)], [config(r) for r in (2, 4, 3)]
    fresh, trained = (adapters(4, 9, zero_B=True), config(4)), (adapters(4, 9), config(4))
    report = fedrot.aggregate(updates, None, fresh, configs=configs).report
    assert report.target is None and "or every client, is untrained" in str(report)
    streamed = fedrot.FedRotAggregator(fresh, align_on="A")
    for update, own in zip(updates, configs, strict=True):
        streamed.add((update, own))
    assert streamed.finish().report.target is None
    for method in ("fedrot", "fedrot-adaptive"):
        report = fedrot.aggregate(updates, None, trained, configs=configs, method=method, align_on="A").report
        assert [(a.undetermined, a.directions) for a in report.adapters] == [(0, 9)] * 2, method


def test_clients_whose_factor_is_zero_rotate_nothing():
    updates = [{key: x * ("lora_A" in key) for key, x in adapters(4, seed).items()} for seed in range(3)]
    report = fedrot.aggregate(updates, None, adapters(4, 9), align_on="B").report
    assert "nothing was rotated: the reference, or every client, is untrained" in str(report)
    streamed = fedrot.FedRotAggregator(adapters(4, 9), method="fedit")
    for update in updates:
        streamed.add(update)
    assert {a.undetermined for a in streamed.finish().report.adapters} == {None}


def test_references_of_another_dtype_decide_what_is_determined_alike_everywhere():
    """One adapter's reference in bfloat16, whose rounding leaves more undetermined than the other's in float32."""
    generator = torch.Generator().manual_seed(0)
    reference, *updates = (adapters(4, seed, 30) for seed in (9, 0, 1, 2))
    for module in ("l0", "l1"):
        key, U = f"base_model.model.{module}.lora_B.weight", torch.randn(2, 4, generator=generator)
        for state in (reference, *updates):
            state[key] = (3 * torch.eye(30, 2) + 0.1 * torch.randn(30, 2, generator=generator)) @ U
    for key in reference:
        if "l0" in key:
            reference[key] = reference[key].bfloat16()
    options = {"align_on": "B", "strength": 1.0}
    whole = fedrot.aggregate(updates, None, reference, **options)
    streamed = fedrot.FedRotAggregator(reference, **options)
    for update in updates:
        streamed.add(update)
    stream = streamed.finish()
    adaptive = fedrot.aggregate(updates, None, reference, method="fedrot-adaptive", align_on="B")
    counts = [[a.undetermined for a in result.report.adapters] for result in (whole, stream, adaptive)]
    assert counts == [[6, 6]] * 3
    for key, mean in whole.state_dict.items():
        assert (stream.state_dict[key] - mean).norm() <= 1e-5 * mean.norm()
    double = {key: x.double() for key, x in adapters(4, 9).items()}
    streamed = fedrot.FedRotAggregator(double, align_on="B")
    streamed.add(adapters(4, 1))
    assert streamed.finish().report.undetermined == 0
