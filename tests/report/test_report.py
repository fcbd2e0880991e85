"""What a report says of every adapter, against the definitions in float64."""

import pytest
import torch

import fedrot
from fedrot_kernels import reference as oracle
from fedrot_kernels.measures import rotation_angle

from ..definitions import SHARES, WEIGHTS, assert_same_bits, every_kind, expected_rotations, factors
from ..peft_models import factor_keys, turned_clients

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
]


@every_kind
def test_the_report_measures_every_adapter(kind):
    reference, clients = turned_clients(kind, 3, noise=1.0)
    options = {"on": "A", "reflections": True, "strength": 1.0}
    report = fedrot.aggregate(
        clients, WEIGHTS, reference, align_on="A", reflections=True, strength=1.0, report_error=True
    ).report
    assert report.clients == ("client 0", "client 1", "client 2") and report.dropped == {} and report.method == "fedrot"
    assert report.weights == pytest.approx(SHARES, rel=1e-15)
    squares = torch.zeros(2, dtype=torch.float64)
    for keys, adapter in zip(factor_keys(reference), report.adapters, strict=True):
        assert keys[0].startswith(adapter.module + ".lora_") and adapter.rank == len(reference[keys[0]])
        R = expected_rotations(clients, reference, keys, **options)
        A, B = zip(*(factors(client, keys) for client in clients), strict=True)
        turned = [r.T @ a for r, a in zip(R, A, strict=True)], [b @ r for r, b in zip(R, B, strict=True)]
        error = oracle.aggregation_error(*turned, WEIGHTS)
        norm = sum(w * b @ a for w, a, b in zip(SHARES, A, B, strict=True)).norm()
        assert adapter.error == pytest.approx(error.item(), abs=1e-5 * norm.item())
        assert adapter.update_norm == pytest.approx(norm.item(), rel=1e-5)
        assert adapter.relative_error == adapter.error / adapter.update_norm
        assert adapter.angles == pytest.approx(rotation_angle(torch.stack(R)).tolist(), abs=0.05)
        squares += torch.stack([error, norm]).square()
    whole = [squares[0].sqrt().item(), (squares[0] / squares[1]).sqrt().item()]
    assert [report.error, report.relative_error] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("method", ["fedrot", "fedit"])
@every_kind
def test_leaving_out_the_error_leaves_out_nothing_else(kind, method):
    reference, clients = turned_clients(kind, 3)
    whole = fedrot.aggregate(clients, WEIGHTS, reference, method=method)
    quick = fedrot.aggregate(clients, WEIGHTS, reference, method=method, report_error=False)
    assert_same_bits(quick.state_dict, whole.state_dict)
    assert [a.angles for a in quick.report.adapters] == [a.angles for a in whole.report.adapters]
    assert {(a.error, a.update_norm, a.relative_error) for a in quick.report.adapters} == {(None, None, None)}
    assert quick.report.error is None and quick.report.relative_error is None and "–" in str(quick.report)
    aggregator = fedrot.FedRotAggregator(reference, method=method, report_error=False)
    assert aggregator.aggregate(clients, WEIGHTS).report == quick.report
