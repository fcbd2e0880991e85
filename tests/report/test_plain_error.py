"""Did rotating help? The error of the plain average stands beside the result's, and the report says where it did harm."""

import json

import pytest
import torch

import fedrot

from ..peft_models import KINDS, client_updates, factor_keys, turned_clients
from ..streams import added, started

WEIGHTS = [1.0, 2.0, 4.5]


def noisy_on_B(n=3):
    """A reference whose B is small and clients whose B is mostly noise: aligned on it, A is turned at random."""
    reference, _ = turned_clients(KINDS["linear"], 1)
    reference = {key: 1e-3 * x if "lora_B" in key else x for key, x in reference.items()}
    noise = client_updates(KINDS["linear"], n, seed=5)
    clients = [{k: (x[k] if "lora_B" in k else y + 0.01 * x[k]) for k, y in reference.items()} for x in noise]
    return reference, clients


@pytest.mark.parametrize("exact", [True, "estimate"])
def test_the_plain_error_is_fedits(exact):
    reference, clients = turned_clients(KINDS["linear"], 3, noise=0.5)
    fedit = fedrot.aggregate(clients, WEIGHTS, reference, method="fedit", report_error=exact).report
    for options in ({}, {"align_on": "A", "strength": 1.0}, {"reflections": True}, {"backend": "torch"}):
        report = fedrot.aggregate(clients, WEIGHTS, reference, report_error=exact, **options).report
        assert report.plain_error == pytest.approx(fedit.error, rel=1e-4)
        assert report.plain_relative_error == pytest.approx(fedit.relative_error, rel=1e-4)
        assert report.error < report.plain_error and not report.rotating_hurt
        assert f"plain averaging would lose {report.plain_error:.3e}" in str(report)
        for a, b in zip(report.adapters, fedit.adapters, strict=True):
            assert a.plain_error == pytest.approx(b.error, rel=1e-4)
    assert fedit.plain_error == fedit.error and "plain averaging" not in str(fedit)
    stream = added(started(reference, seed=0), clients, range(3), WEIGHTS).finish().report
    if exact == "estimate":
        assert stream.plain_error == pytest.approx(fedit.error, rel=1e-4)


@pytest.mark.parametrize("exact", [True, "estimate"])
def test_the_report_says_where_rotating_did_harm(exact):
    reference, clients = noisy_on_B()
    hurt = fedrot.aggregate(clients, WEIGHTS, reference, align_on="B", strength=1.0, report_error=exact).report
    assert hurt.error > 1.1 * hurt.plain_error and hurt.rotating_hurt
    assert "fedrot-adaptive" in str(hurt) and 'align_on="A"' in str(hurt)
    helped = fedrot.aggregate(clients, WEIGHTS, reference, align_on="A", report_error=exact).report
    assert not helped.rotating_hurt and "fedrot-adaptive" not in str(helped)
    plain = json.loads(json.dumps(hurt.as_dict()))
    assert plain["plain_error"] == hurt.plain_error and plain["plain_relative_error"] == hurt.plain_relative_error


def test_without_errors_nothing_is_said_of_plain_averaging():
    reference, clients = turned_clients(KINDS["linear"], 3)
    report = fedrot.aggregate(clients, WEIGHTS, reference, report_error=False).report
    assert report.plain_error is report.plain_relative_error is None and not report.rotating_hurt
    assert "plain averaging" not in str(report)
    result = fedrot.aggregate(clients, WEIGHTS, reference)
    again = fedrot.aggregate(clients, WEIGHTS, reference)
    assert result.report == again.report  # the same seed, the same estimates
    a, _ = factor_keys(reference)[0]
    assert torch.equal(result.state_dict[a], again.state_dict[a])


@pytest.mark.parametrize("exact", [True, "estimate"])
def test_rounding_is_no_harm(exact):
    reference, clients = turned_clients(KINDS["linear"], 3)
    for updates, weights in (([clients[0]] * 5, None), ([clients[0]] * 5, [1, 2, 3, 4, 5.3]), (clients, [0, 0, 1])):
        report = fedrot.aggregate(updates, weights, reference, report_error=exact).report
        assert report.error <= 1e-6 and not report.rotating_hurt


def test_clients_that_are_rescaled_have_no_plain_error():
    reference, clients = turned_clients(KINDS["linear"], 3)
    for exact in (True, "estimate"):
        report = fedrot.aggregate(clients, WEIGHTS, reference, method="scalar", report_error=exact).report
        assert report.error is not None and report.plain_error is None
    assert added(started(reference, method="scalar"), clients, range(3)).finish().report.plain_error is None


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_estimates_of_large_factors_are_no_zeros(backend):
    reference, clients = turned_clients(KINDS["linear"], 3, noise=0.3)
    big = [{key: 1e12 * x for key, x in update.items()} for update in (reference, *clients)]
    small = fedrot.aggregate(clients, WEIGHTS, reference, method="fedit", backend=backend).report
    large = fedrot.aggregate(big[1:], WEIGHTS, big[0], method="fedit", backend=backend).report
    for a, b in zip(small.adapters, large.adapters, strict=True):
        assert b.update_norm == pytest.approx(1e24 * a.update_norm, rel=1e-4)
        assert b.error == pytest.approx(1e24 * a.error, rel=1e-4)
