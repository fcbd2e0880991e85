"""Attackers on Flower: refused by the strategy as by the aggregator, whatever basis a client is in."""

import pytest
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping

from fedrot import aggregate
from fedrot.flower import AlignMod, FedRot, from_arrays, to_arrays

from ..refusals import refused
from ..robust.rounds import turned
from .local_grid import LocalGrid, client_app
from .strategy_runs import assert_equal, start_of
from .wrong_replies import KIND, changed


def flip(state):
    start = start_of(KIND)
    return {key: start[key] - 4 * (x - start[key]) for key, x in state.items()}


def federation(attackers=(3,), rotated=(), n=6):
    spoils = {c: changed(flip) for c in attackers} | {c: changed(lambda s: turned([s])[0]) for c in rotated}
    return LocalGrid({c: client_app(KIND, spoil=spoils.get(c)) for c in range(n)})


def run(grid, **options):
    strategy = FedRot(fraction_evaluate=0.0, **options)
    return strategy.start(grid, to_arrays(start_of(KIND)), num_rounds=1), strategy


@pytest.mark.parametrize("rotated", [(), (0, 5)])
def test_an_attacker_is_refused_and_no_one_who_is_rotated(rotated, caplog):
    options = {"robust": "multi-krum", "byzantine": 1, "clip": "median"}
    with caplog.at_level("INFO", "flwr"):
        result, strategy = run(federation(rotated=rotated), **options)
    report = strategy.result.report
    assert list(report.choice.refused) == ["client 3"] and "client 3" not in report.clients
    assert strategy.train_metrics["refused"] == 1 and strategy.train_metrics["clipped"] == len(report.choice.clipped) > 0
    assert "round 1: refused client 3: its score is" in caplog.text
    if not rotated:
        grid = federation()
        run(grid, method="fedit")
        sent = sorted(grid.received, key=lambda message: -message.metadata.src_node_id)
        updates = [from_arrays(message.content["arrays"]) for message in sent]
        expected = aggregate(updates, [c + 1.0 for c in range(6)], start_of(KIND), **options)
        assert_equal(from_arrays(result.arrays), expected.state_dict)


def test_too_few_answers_for_krum_end_the_run_by_name():
    grid = federation((), n=5)
    grid.apps[100 - 2] = None
    with pytest.raises(AggregationError, match=r"4 good answers with examples, but robust='krum' needs 5; node 98: "):
        run(grid, robust="krum", byzantine=1)


@pytest.mark.parametrize("options", [{"robust": "krum"}, {"clip": "median"}])
def test_with_privacy_they_are_refused(options):
    strategy = DifferentialPrivacyServerSideFixedClipping(FedRot(fraction_evaluate=0.0, **options), 0.1, 1.0, 6)
    with refused("robust and clip", "differential privacy", error=ValueError):
        strategy.start(federation(), to_arrays(start_of(KIND)), num_rounds=1)
    with refused("robust and clip compare the updates of all clients", "secure", error=TypeError):
        AlignMod(**options)
