"""Consensus, least error and adaptive strength through the public API, on adapters that PEFT made."""

import pytest
import torch

import fedrot

from ..definitions import assert_same_bits
from ..peft_models import KINDS, client_updates, factor_keys, save_folder, turned_clients
from ..refusals import LINEAR, A, refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
]
WEIGHTS = [1.0, 2.0, 4.5]
SHARES = [w / sum(WEIGHTS) for w in WEIGHTS]
MODES = [
    {"method": "fedrot-consensus"},
    {"method": "fedrot-consensus", "align_on": "A", "reflections": True},
    {"method": "fedrot-least-error"},
    {"method": "fedrot-least-error", "reflections": True},
    {"method": "fedrot-adaptive"},
    {"method": "fedrot-adaptive", "align_on": "joint", "reflections": True},
]


def name_of(mode):
    return " ".join([mode["method"], *(name for name in mode if name != "method")])


every_mode = pytest.mark.parametrize("mode", MODES, ids=name_of)
every_fixed_strength = pytest.mark.parametrize("mode", MODES[:4], ids=name_of)
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def lost(updates, merged, shares=SHARES):
    """‖Σ wᵢBᵢAᵢ − B̄Ā‖ and ‖Σ wᵢBᵢAᵢ‖ of every adapter, by dense matrices in float64."""
    found = []
    for key_A, key_B in factor_keys(merged):
        products = [u[key_B].double().flatten(1) @ u[key_A].double().flatten(1) for u in (*updates, merged)]
        mean = sum(w * P for w, P in zip(shares, products[:-1], strict=True))
        found.append((float(torch.linalg.norm(mean - products[-1])), float(torch.linalg.norm(mean))))
    return found


@every_kind
@every_mode
def test_every_kind_of_adapter_is_merged_as_reported(kind, mode):
    _, updates = turned_clients(kind, 3, noise=0.3)
    found = fedrot.aggregate(updates, WEIGHTS, **mode, report_error=True)
    again = fedrot.aggregate(updates, WEIGHTS, **mode, report_error=True)
    plain = fedrot.aggregate(updates, WEIGHTS, method="fedit")
    assert list(found.state_dict) == list(updates[0])
    factors = {key for keys in factor_keys(updates[0]) for key in keys}
    for key, x in found.state_dict.items():
        assert (x.shape, x.dtype) == (updates[0][key].shape, updates[0][key].dtype)
        assert torch.equal(x, again.state_dict[key])
        assert key in factors or torch.equal(x, plain.state_dict[key])
    eps = torch.finfo(kind.dtype).eps
    for adapter, (error, norm) in zip(found.report.adapters, lost(updates, found.state_dict), strict=True):
        # The report is of the means before they are rounded to the dtype, and of rotations before they are to float32.
        assert adapter.error == pytest.approx(error, abs=8 * max(eps, 1e-7) * adapter.rank * norm)
        # The least error has Gram matrices of float32, and float32 measures what the compiled library aligned.
        assert adapter.update_norm == pytest.approx(norm, rel=1e-9 if mode["method"] == "fedrot-adaptive" else 1e-6)
        assert len(adapter.angles) == 3 and all(0 <= angle <= 180 for angle in adapter.angles)
        assert (adapter.strength is None) == (mode["method"] != "fedrot-adaptive")


@every_fixed_strength
def test_no_strength_is_fedit_to_the_bit(mode):
    updates = client_updates(LINEAR, 3)
    plain = fedrot.aggregate(updates, WEIGHTS, method="fedit").state_dict
    found = fedrot.aggregate(updates, WEIGHTS, **mode, strength=0).state_dict
    assert_same_bits(found, plain)
    stream = fedrot.FedRotAggregator(**mode, strength=0)
    for update, weight in zip(updates, WEIGHTS, strict=True):
        stream.add(update, weight)
    assert_same_bits(stream.finish().state_dict, plain)


@every_fixed_strength
def test_the_strength_left_open_is_one(mode):
    _, updates = turned_clients(LINEAR, 3)
    by_default, whole, half = (
        fedrot.aggregate(updates, WEIGHTS, **mode, **options).state_dict
        for options in ({}, {"strength": 1}, {"strength": 0.5})
    )
    assert_same_bits(by_default, whole)
    assert not torch.equal(by_default[A], half[A])


def test_errors_of_real_modes_fall():
    """On adapters of one update in three bases, with differences of their own."""
    common, updates = turned_clients(LINEAR, 3, noise=0.4)
    order = ["fedrot-least-error", "fedrot-consensus", "fedrot-adaptive", "fedrot", "fedit"]
    errors = [fedrot.aggregate(updates, WEIGHTS, common, method=method).report.error for method in order]
    assert errors == sorted(errors) and len(set(errors)) == len(errors)


@pytest.mark.parametrize("method", ["fedrot-consensus", "fedrot-least-error"])
def test_the_result_is_turned_towards_the_reference(method):
    common, updates = turned_clients(LINEAR, 3, noise=0.01)
    factors = [key for keys in factor_keys(common) for key in keys]
    heaviest = updates[WEIGHTS.index(max(WEIGHTS))]
    for given, target in ((common, common), (None, heaviest)):
        found = fedrot.aggregate(updates, WEIGHTS, given, method=method).state_dict
        # The clients are the common adapter, turned, with noise of a hundredth.
        distances = [float((found[key] - target[key]).norm() / target[key].norm()) for key in factors]
        assert max(distances) < 0.02


@pytest.mark.parametrize("align_on", ["A", "B"])
def test_consensus_counts_both_factors_unless_it_is_given_one(align_on):
    _, updates = turned_clients(LINEAR, 3, noise=0.4)

    def aggregated(**options):
        return fedrot.aggregate(updates, WEIGHTS, method="fedrot-consensus", **options).state_dict

    both = aggregated()
    for same in ({"align_on": "joint"}, {"align_on": "alternate"}, {"round": 1}):
        assert torch.equal(aggregated(**same)[A], both[A])
    assert not torch.allclose(aggregated(align_on=align_on)[A], both[A])


def test_an_aggregator_keeps_the_consensus_and_its_basis():
    common, updates = turned_clients(LINEAR, 3)
    server = fedrot.FedRotAggregator(common, method="fedrot-consensus")
    first = server.aggregate(updates, WEIGHTS)
    second = server.aggregate(updates, WEIGHTS)
    by_hand = fedrot.aggregate(updates, WEIGHTS, common, method="fedrot-consensus")
    then = fedrot.aggregate(updates, WEIGHTS, first.state_dict, method="fedrot-consensus", round=1)
    for found, wanted in ((first, by_hand), (second, then)):
        assert_same_bits(found.state_dict, wanted.state_dict)
    assert server.round == 2 and server.reference is second.state_dict


def test_where_every_strength_is_as_good_the_papers_is_chosen_in_every_round():
    """Clients that are the reference lose nothing at any λ; no round remembers what the last one chose."""
    common, others = turned_clients(LINEAR, 3, noise=0.4)
    server = fedrot.FedRotAggregator(common, method="fedrot-adaptive")
    chosen = []
    for clients in ([common, common], others, [common, common]):
        server.reference = common
        chosen.append([a.strength for a in server.aggregate(clients).report.adapters])
    assert set(chosen[0]) == {0.5} and chosen[2] == chosen[0] != chosen[1]
    again = fedrot.aggregate(others, reference=common, method="fedrot-adaptive", round=1).report
    assert [a.strength for a in again.adapters] == chosen[1]


def test_the_adaptive_strength_is_the_best_of_the_grid_within_a_hundredth():
    common, updates = turned_clients(LINEAR, 3, noise=0.4)
    options = {"align_on": "joint"}
    found = fedrot.aggregate(updates, WEIGHTS, common, method="fedrot-adaptive", **options).report
    grid = [fedrot.aggregate(updates, WEIGHTS, common, strength=s / 10, **options).report for s in range(11)]
    assert found.adapters
    for i, adapter in enumerate(found.adapters):
        errors = [report.adapters[i].error for report in grid]
        assert adapter.error == pytest.approx(errors[round(10 * adapter.strength)], rel=1e-5)
        assert adapter.error <= 1.02 * min(errors)


def test_the_strengths_chosen_are_shown():
    common, updates = turned_clients(LINEAR, 3)
    report = fedrot.aggregate(updates, WEIGHTS, common, method="fedrot-adaptive", align_on="joint").report
    strengths = [a.strength for a in report.adapters]
    assert f"strengths chosen: {min(strengths):g} to {max(strengths):g}" in str(report)
    assert "chosen" not in str(fedrot.aggregate(updates, WEIGHTS, common).report)


@every_mode
def test_what_cannot_be_averaged_is_named_or_dropped(mode):
    _, updates = turned_clients(LINEAR, 3)
    bad = [updates[0], {**updates[1], A: torch.full_like(updates[1][A], torch.nan)}, updates[2]]
    with refused("client 1", A, "NaN"):
        fedrot.aggregate(bad, WEIGHTS, **mode)
    found = fedrot.aggregate(bad, WEIGHTS, **mode, on_invalid="drop")
    alone = fedrot.aggregate([updates[0], updates[2]], [WEIGHTS[0], WEIGHTS[2]], **mode)
    assert list(found.report.dropped) == ["client 1"]
    assert_same_bits(found.state_dict, alone.state_dict)


@every_mode
def test_one_client_keeps_its_update(mode):
    common, (update,) = turned_clients(LINEAR, 1)
    for reference in (common, None):
        found = fedrot.aggregate([update], reference=reference, **mode)
        assert found.report.relative_error < 1e-6
        assert all(error < 2e-6 * norm for error, norm in lost([update], found.state_dict, [1.0]))


def test_folders_and_a_folder_called_consensus(tmp_path, monkeypatch):
    """The word is an old spelling, unless there is a folder of that name."""
    common, updates = turned_clients(LINEAR, 2)
    folders = [save_folder(LINEAR, u, tmp_path / f"client{i}") for i, u in enumerate(updates)]
    monkeypatch.chdir(tmp_path)
    with refused("fedrot-consensus", error=ValueError):
        fedrot.aggregate(folders, reference="consensus")
    save_folder(LINEAR, common, tmp_path / "consensus")
    for method in ("fedrot", "fedrot-consensus"):
        found = fedrot.aggregate(folders, reference="consensus", method=method).state_dict  # in the file's order
        expected = fedrot.aggregate(updates, reference=common, method=method).state_dict
        assert_same_bits(dict(sorted(found.items())), dict(sorted(expected.items())))
