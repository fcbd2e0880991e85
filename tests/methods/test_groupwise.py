"""Consensus, least error and chosen strengths through the public API, on adapters that PEFT made."""

import pytest
import torch

import fedrot

from ..peft_models import KINDS, client_updates, factor_keys, save_folder, turned_clients
from ..refusals import LINEAR, A, refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
]
WEIGHTS = [1.0, 2.0, 4.5]
SHARES = [w / sum(WEIGHTS) for w in WEIGHTS]
MODES = [
    {"reference": "consensus"},
    {"reference": "consensus", "align_on": "A", "group": "O"},
    {"reference": "consensus", "strength": "auto"},
    {"strength": "auto"},
    {"align_on": "error"},
    {"align_on": "error", "group": "GL"},
]
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(mode.values()))
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def lost(updates, merged):
    """‖Σ wᵢBᵢAᵢ − B̄Ā‖ and ‖Σ wᵢBᵢAᵢ‖ of every adapter, by dense matrices in float64."""
    found = []
    for key_A, key_B in factor_keys(merged):
        products = [u[key_B].double().flatten(1) @ u[key_A].double().flatten(1) for u in (*updates, merged)]
        mean = sum(w * P for w, P in zip(SHARES, products[:-1], strict=True))
        found.append((float(torch.linalg.norm(mean - products[-1])), float(torch.linalg.norm(mean))))
    return found


@every_kind
@every_mode
def test_every_kind_of_adapter_is_merged_as_reported(kind, mode):
    _, updates = turned_clients(kind, 3, noise=0.3)
    found = fedrot.aggregate(updates, WEIGHTS, **mode)
    again = fedrot.aggregate(updates, WEIGHTS, **mode)
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
        assert adapter.update_norm == pytest.approx(norm, rel=1e-9)
        assert len(adapter.angles) == 3 and all(0 <= angle <= 180 for angle in adapter.angles)
        assert (adapter.strength is None) == (mode.get("strength") != "auto")


@every_mode
def test_no_strength_is_fedit_to_the_bit(mode):
    updates = client_updates(LINEAR, 3)
    plain = fedrot.aggregate(updates, WEIGHTS, method="fedit").state_dict
    found = fedrot.aggregate(updates, WEIGHTS, **{**mode, "strength": 0}).state_dict
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_errors_of_real_modes_fall():
    """On adapters of one update in three bases, with differences of their own."""
    _, updates = turned_clients(LINEAR, 3, noise=0.4)
    error = {
        name: fedrot.aggregate(updates, WEIGHTS, **mode).report.error
        for name, mode in {
            "fedit": {"method": "fedit"},
            "fedrot": {},
            "auto": {"strength": "auto"},
            "consensus": {"reference": "consensus"},
            "error": {"align_on": "error"},
            "GL": {"align_on": "error", "group": "GL"},
        }.items()
    }
    assert error["GL"] < error["error"] < error["consensus"] < error["auto"] < error["fedrot"] < error["fedit"]


def test_the_result_is_turned_towards_the_previous_adapter():
    common, updates = turned_clients(LINEAR, 3, noise=0.01)
    for mode in ({"reference": "consensus", "previous": common}, {"reference": common, "align_on": "error"}):
        found = fedrot.aggregate(updates, WEIGHTS, **mode)
        for key in (key for keys in factor_keys(common) for key in keys):
            # The clients are the common adapter, turned, with noise of a hundredth.
            distance = torch.linalg.norm(found.state_dict[key] - common[key]) / torch.linalg.norm(common[key])
            assert float(distance) < 0.02
    without = fedrot.aggregate(updates, WEIGHTS, "consensus").state_dict
    heaviest = updates[WEIGHTS.index(max(WEIGHTS))]
    assert all(torch.dist(without[k], heaviest[k]) < 0.02 * torch.linalg.norm(heaviest[k]) for k in factor_keys(common)[0])


def test_an_aggregator_keeps_the_consensus_and_its_basis():
    common, updates = turned_clients(LINEAR, 3)
    by_hand = fedrot.aggregate(updates, WEIGHTS, "consensus", previous=common)
    server = fedrot.FedRotAggregator("consensus", previous=common)
    assert server.reference is common
    first = server.aggregate(updates, WEIGHTS)
    second = server.aggregate(updates, WEIGHTS)
    expected = fedrot.aggregate(updates, WEIGHTS, "consensus", previous=first.state_dict, round=1)
    for found, wanted in ((first, by_hand), (second, expected)):
        assert all(torch.equal(found.state_dict[key], x) for key, x in wanted.state_dict.items())
    assert (server.round, server.reference) == (2, second.state_dict)


def test_an_aggregator_prefers_the_strength_it_had():
    """Where the clients are the reference every λ is as good as any other, and the last choice decides."""
    common, _ = turned_clients(LINEAR, 1)
    server = fedrot.FedRotAggregator(common, strength="auto")
    modules = [a.module for a in server.aggregate([common, common]).report.adapters]
    assert server.strengths == dict.fromkeys(modules, 0.5)
    server.strengths = {modules[0]: 0.9}
    chosen = {a.module: a.strength for a in server.aggregate([common, common]).report.adapters}
    assert chosen == server.strengths == {**dict.fromkeys(modules, 0.5), modules[0]: 0.9}


def test_the_strengths_chosen_are_shown():
    common, updates = turned_clients(LINEAR, 3)
    report = fedrot.aggregate(updates, WEIGHTS, common, strength="auto", align_on="joint").report
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
    assert all(torch.equal(found.state_dict[key], x) for key, x in alone.state_dict.items())


def test_what_needs_all_clients_says_so():
    _, updates = turned_clients(LINEAR, 3)
    for mode in MODES:
        previous = {"previous": updates[0]} if mode.get("reference") else {"reference": updates[0]}
        with refused("all updates of a round at once", error=ValueError):
            fedrot.FedRotAggregator(**{**previous, **mode}).add(updates[0])
    for option in ({"align_on": "error"}, {"strength": "auto"}):
        with refused("all clients", error=ValueError):
            fedrot.align(updates[0], updates[1], **option)


def test_options_that_contradict_each_other():
    updates = client_updates(LINEAR, 2)
    for options, word in (
        ({"align_on": "error", "strength": "auto"}, "strength"),
        ({"group": "GL"}, "align_on"),
        ({"align_on": "error", "group": "GL", "strength": 0.5}, "invertible"),
        ({"previous": updates[0]}, "consensus"),
        ({"reference": updates[0], "previous": updates[0]}, "consensus"),
        ({"method": "random-rotation", "strength": "auto"}, "random-rotation"),
        ({"strength": "much"}, "strength"),
    ):
        with refused(word, error=ValueError):
            fedrot.aggregate(updates, **options)


def test_one_client_keeps_its_update():
    common, updates = turned_clients(LINEAR, 1)
    for mode in MODES:
        found = fedrot.aggregate(
            updates, **mode, **({"previous": common} if mode.get("reference") else {"reference": common})
        )
        assert found.report.relative_error < 1e-6
        assert all(error < 2e-6 * norm for error, norm in lost_of_one(updates[0], found.state_dict))


def lost_of_one(update, merged):
    pairs = factor_keys(merged)
    products = [[u[b].double() @ u[a].double() for a, b in pairs] for u in (update, merged)]
    return [(float(torch.linalg.norm(x - y)), float(torch.linalg.norm(x))) for x, y in zip(*products, strict=True)]


def test_folders_and_a_folder_called_consensus(tmp_path, monkeypatch):
    """The word is the mode, a path of that name the folder."""
    common, updates = turned_clients(LINEAR, 2)
    folders = [save_folder(LINEAR, u, tmp_path / f"client{i}") for i, u in enumerate(updates)]
    save_folder(LINEAR, common, tmp_path / "consensus")
    monkeypatch.chdir(tmp_path)
    word = fedrot.aggregate(folders, reference="consensus").state_dict
    path = fedrot.aggregate(folders, reference="./consensus").state_dict
    for found, options in ((word, {"reference": "consensus"}), (path, {"reference": common})):
        expected = fedrot.aggregate(updates, **options).state_dict
        assert all(torch.equal(found[key], x) for key, x in expected.items())
