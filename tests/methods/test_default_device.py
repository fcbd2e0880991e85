"""What PyTorch makes by default plays no part in a round: a server may have set another device."""

import pytest
import torch

import fedrot
from fedrot import METHODS
from fedrot.methods.registry import make_method
from fedrot.options import AggregationOptions

from ..dense import lora_config, with_frozen
from ..peft_models import KINDS, factor_keys, turned_clients

LINEAR = KINDS["linear"]


def weak(update):
    """The update with one direction of every factor nearly lost, whose rotation takes exact products."""
    update = {key: x.clone() for key, x in update.items()}
    for key_A, key_B in factor_keys(update):
        update[key_A][1] *= 1e-5
        update[key_B][:, 1] *= 1e-5
    return update


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("method", METHODS)
def test_the_default_device_changes_no_bit(method, backend):
    common, updates = turned_clients(LINEAR, 3)
    common, *updates = map(weak, (common, *updates))
    if frozen := set("AB") - set(make_method(AggregationOptions(method=method)).trains(0)):
        common, *updates = with_frozen([common, *updates], *frozen)
    options = {"reference": common, "configs": lora_config(LINEAR), "method": method, "backend": backend}
    expected = fedrot.aggregate(updates, **options)
    with torch.device("meta"):
        found = fedrot.aggregate(updates, **options)
    assert all(torch.equal(x, found.state_dict[key]) for key, x in expected.state_dict.items())
    assert found.report == expected.report


def test_sums_of_servers_on_another_default_device(tmp_path):
    common, updates = turned_clients(LINEAR, 3)
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            here, there = (fedrot.FedRotAggregator(common) for _ in range(2))
            here.add(updates[0])
            there.add(updates[1])
            there.add(updates[2])
            there.partial("north").save(tmp_path / device)
            here.merge(tmp_path / device)
            results.append(here.finish())
    assert all(torch.equal(x, results[1].state_dict[key]) for key, x in results[0].state_dict.items())
    assert results[0].report == results[1].report
