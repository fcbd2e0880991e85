"""Experts, whose factors are slices of one tensor, in the Triton kernels."""

import pytest
import torch

import fedrot

from ...mixtures import EXPERTS, clients

pytestmark = pytest.mark.filterwarnings("ignore:The following")


@pytest.mark.parametrize("method", ["fedrot", "fedit"])
@pytest.mark.parametrize("name", ["Qwen3-MoE, all linear", "JetMoE, no name of experts"])
def test_experts_are_averaged_as_by_pytorch(name, method):
    base, config, count = EXPERTS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora, updates = clients(base, config, 3, dtype=torch.float32)
    updates = [{key: x.to(device) for key, x in u.items()} for u in updates]
    options = {"reference": updates[0], "method": method, "configs": lora, "strength": 1.0}
    result = fedrot.aggregate(updates, backend="triton", **options)
    expected = fedrot.aggregate(updates, backend="torch", **options)
    assert list(result.state_dict) == list(updates[0]) and len(result.report.adapters) == count
    for key, x in expected.state_dict.items():
        torch.testing.assert_close(result.state_dict[key], x, rtol=2e-5, atol=2e-5)
