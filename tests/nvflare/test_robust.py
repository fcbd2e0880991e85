"""Attackers among NVIDIA FLARE's sites: refused as by the aggregator, and named."""

import logging

import fedrot
from fedrot.nvflare import FedRotModelAggregator

from ..peft_models import KINDS, turned_clients
from ..refusals import refused
from .rounds import contiguous, equal, run_round

OPTIONS = {"robust": "multi-krum", "byzantine": 1, "clip": "median"}


def test_an_attacker_is_refused(caplog):
    start, updates = turned_clients(KINDS["modules to save"], 6)
    start, updates = contiguous(start), [contiguous(update) for update in updates]
    updates[2] = {key: -5 * x if ".lora_B" in key else x for key, x in updates[2].items()}
    names, steps = [f"site-{i}" for i in range(6)], (1, 2, 3, 4, 5, 6)
    aggregator = FedRotModelAggregator(**OPTIONS)
    with caplog.at_level(logging.INFO):
        out = run_round(aggregator, start, updates, names=names, steps=steps)
    expected = fedrot.aggregate(updates, steps, start, **OPTIONS)
    assert equal(out.params, expected.state_dict) and list(aggregator.result.report.choice.refused) == ["site-2"]
    assert out.metrics["clients"] == 5 and out.metrics["refused"] == 1 and out.metrics["clipped"] > 0
    assert "refused site-2: its score is" in caplog.text


def test_too_few_sites_for_krum(start, updates):
    with refused("robust='krum' needs at least 2f + 3 = 5", "has 3"):
        run_round(FedRotModelAggregator(robust="krum", byzantine=1), start, updates)


def test_options_travel_in_a_jobs_configuration():
    """NVFlare reads a component's attributes of the names that its signature has."""
    aggregator = FedRotModelAggregator(**OPTIONS)
    assert {name: getattr(aggregator, name) for name in OPTIONS} == OPTIONS
