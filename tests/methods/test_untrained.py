"""Towards an untrained reference nothing rotates, whichever factor is aligned: the paper's first round."""

import pytest
import torch
from peft import get_peft_model_state_dict

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
        assert "nothing was rotated: the reference is untrained" in str(result.report)
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
