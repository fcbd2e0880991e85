"""What the paper's analysis rests on, against definitions in float64 by NumPy and SciPy."""

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

import fedrot
from fedrot.methods.registry import METHODS, make_method
from fedrot.options import AggregationOptions
from fedrot.simulation.geometry import alignment_geometry
from fedrot_kernels.measures import aggregation_error, error_bound

from ..peft_models import KINDS, client_updates, factor_keys, turned_clients

WEIGHTS = [1.0, 2.0, 4.5]


# Methods whose mean is of the factors as they came, and those that rotate or scale them first.
PLAIN = [name for name, kind in METHODS.items() if "fedrot" not in name and not kind.ablation]
TOGETHER = ["fedrot-consensus", "fedrot-least-error", "fedrot-adaptive"]
AVERAGED = ["fedit", "fedrot", *TOGETHER, "random-rotation", "scalar"]


def measure(states, reference, method="fedrot", round=1, weights=WEIGHTS, **options):
    return alignment_geometry(states, weights, reference, make_method(AggregationOptions(method=method, **options)), round)


def matrix(update, key):
    return update[key].detach().double().flatten(1).numpy()


def frames(update, factor):
    """A, or Bᵀ, of every adapter."""
    pairs = factor_keys(update)
    return [matrix(update, a) if factor == "A" else matrix(update, b).T for a, b in pairs]


def full_rotation(F, F_ref, reflections):
    R, _ = orthogonal_procrustes(F.T, F_ref.T)
    if not reflections and np.linalg.det(R) < 0:
        U, _, Vt = np.linalg.svd(F @ F_ref.T)
        R = (U * ([1] * (len(R) - 1) + [-1])) @ Vt
    return R


def expected(states, reference, factor, reflections, weights=WEIGHTS):
    before, after, turn, size = np.zeros((4, len(states), len(frames(reference, factor))))
    for i, state in enumerate(states):
        for j, (F, F_ref) in enumerate(zip(frames(state, factor), frames(reference, factor), strict=True)):
            R = full_rotation(F, F_ref, reflections)
            before[i, j], after[i, j] = np.linalg.norm(F - F_ref), np.linalg.norm(R.T @ F - F_ref)
            turn[i, j], size[i, j] = np.linalg.norm(R - np.eye(len(R))), np.linalg.norm(F_ref)
    w = np.array(weights) / sum(weights)
    return {
        f"removed_{factor}": 1 - (w @ after**2).sum() / (w @ before**2).sum(),
        f"turn_per_distance_{factor}": (w @ (turn / before)).mean(),
        f"turn_per_distance_{factor}_max": (turn / before).max(),
        f"smallest_distance_{factor}": before.min(),
        f"smallest_relative_distance_{factor}": (before / size).min(),
    }


@pytest.mark.parametrize("reflect", [False, True], ids=["turned", "mirrored"])
@pytest.mark.parametrize("reflections", [False, True], ids=["SO", "O"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding", "bfloat16", "float64"])
def test_distances_and_turns_are_those_of_the_full_rotation(kind, reflections, reflect):
    reference, states = turned_clients(KINDS[kind], 3, reflect=reflect)
    row = measure(states, reference, reflections=reflections, strength=0.3)
    truth = expected(states, reference, "A", reflections) | expected(states, reference, "B", reflections)
    # A reflected frame is brought into SO by a direction that costs within 1e-4 of the least.
    rel = 1e-4 if reflect and not reflections else 1e-6
    assert {name: x for name, x in row.items() if name != "error_bound"} == pytest.approx(truth, rel=rel)
    assert row["error_bound"] > 0 and row["removed_A"] > 0.5 and row["removed_B"] > 0.5


def test_what_is_undetermined_in_the_clients_precision_does_not_turn():
    """B of rank 1, but for rounding: of r directions all but one say nothing."""
    reference, states = ({k: x.clone() for k, x in u.items()} for u in client_updates(KINDS["linear"], 2))
    for update in (reference, states):
        for _, key in factor_keys(update):
            x = update[key]
            update[key] = x[:, :1] * torch.tensor([1.0, -0.3, 0.7, 0.1]) * (1 + 1e-7 * x)
    row = measure([states], reference, weights=[1])
    run = fedrot.aggregate([states], reference=reference, round=0, strength=1.0, align_on="B").report
    r = 4
    chords = [2 * np.sqrt(r) * np.sin(np.radians(angle) / 2) for a in run.adapters for angle in a.angles]
    distances = [np.linalg.norm(F - G) for F, G in zip(frames(states, "B"), frames(reference, "B"), strict=True)]
    assert row["turn_per_distance_B"] == pytest.approx(np.mean(np.divide(chords, distances)), rel=1e-2)


def bound(states):
    """By definition, for factors that are averaged as they are."""
    w, bounds = np.array(WEIGHTS) / sum(WEIGHTS), []
    for key_A, key_B in factor_keys(states[0]):
        A, B = (np.stack([matrix(x, key) for x in states]) for key in (key_A, key_B))
        spread_A, spread_B = (np.linalg.norm(F - np.tensordot(w, F, 1), axis=(1, 2)) for F in (A, B))
        bounds.append(w @ (spread_A * spread_B))
    return np.linalg.norm(bounds)


@pytest.mark.parametrize("method", ["fedrot", *PLAIN])
def test_the_bound_is_that_of_the_factors_as_they_are_averaged(method):
    reference, states = turned_clients(KINDS["modules to save"], 3)
    averaged = states if method != "fedrot" else [fedrot.align(x, reference, round=1, strength=0.5) for x in states]
    row = measure(states, reference, method, strength=0.5)
    assert row["error_bound"] == pytest.approx(bound(averaged), rel=1e-5)


@pytest.mark.parametrize("method", AVERAGED)
def test_the_error_keeps_the_bound(method):
    reference, states = turned_clients(KINDS["modules to save"], 3)
    limit = measure(states, reference, method, strength=0.5)["error_bound"]
    error = fedrot.aggregate(states, WEIGHTS, reference, method=method, round=1, strength=0.5).report.error
    assert 0.05 * limit < error < limit


@pytest.mark.parametrize("method", TOGETHER)
def test_the_bound_of_clients_that_are_aligned_together_is_of_their_rotated_factors(method):
    reference, states = turned_clients(KINDS["modules to save"], 3)
    row = measure(states, reference, method)
    assert 0 < row["error_bound"] < 0.5 * bound(states)  # turned clients lie close once they are rotated
    if "strength" in METHODS[method].uses:
        assert measure(states, reference, method, strength=0.0)["error_bound"] == pytest.approx(bound(states), rel=1e-5)


def test_every_method_is_measured_in_one_of_these_ways():
    assert {*PLAIN, *AVERAGED} == set(METHODS)


def test_the_bound_is_reached_by_two_clients_of_rank_one():
    """Then Σ wᵢ (Bᵢ−B̄)(Aᵢ−Ā) has summands that are parallel."""
    A, B = torch.randn(1, 2, 1, 9, dtype=torch.float64), torch.randn(1, 2, 7, 1, dtype=torch.float64)
    w = torch.tensor([0.25, 0.75], dtype=torch.float64)
    (error,), _ = aggregation_error(A, B, w)
    assert error_bound(A, B, w).item() == pytest.approx(error.item(), rel=1e-12)


def test_from_a_shared_start_B_has_no_reference_and_turns_nothing():
    reference, states = turned_clients(KINDS["linear"], 3)
    reference = {key: torch.zeros_like(x) if "lora_B" in key else x for key, x in reference.items()}
    row = measure(states, reference)
    assert row["removed_B"] == row["turn_per_distance_B"] == row["turn_per_distance_B_max"] == 0
    assert row["smallest_distance_B"] == pytest.approx(min(np.linalg.norm(F) for s in states for F in frames(s, "B")))
    assert "smallest_relative_distance_B" not in row


def test_a_factor_that_no_client_moved_has_no_ratios():
    reference, states = turned_clients(KINDS["linear"], 3)
    states = [{key: x if "lora_B" in key else reference[key] for key, x in s.items()} for s in states]
    row = measure(states, reference, "ffa-lora")
    assert row["smallest_distance_A"] == row["smallest_relative_distance_A"] == row["error_bound"] == 0
    assert not {"removed_A", "turn_per_distance_A", "turn_per_distance_A_max"} & row.keys()


def test_a_client_that_stayed_has_no_ratio_but_is_the_nearest():
    reference, states = turned_clients(KINDS["linear"], 3)
    row = measure([reference, *states[1:]], reference)
    moved = measure(states[1:], reference, weights=WEIGHTS[1:])
    assert row["smallest_distance_A"] == 0 < moved["smallest_distance_A"]
    for name in ("removed_A", "turn_per_distance_A", "turn_per_distance_A_max"):
        assert row[name] == pytest.approx(moved[name], rel=1e-9)


def test_without_a_reference_the_largest_client_stands_in_and_does_not_count():
    states = client_updates(KINDS["linear"], 3)
    row = measure(states, None)
    given = measure(states[:2], states[2], weights=WEIGHTS[:2])
    assert {k: v for k, v in row.items() if k != "error_bound"} == pytest.approx(
        {k: v for k, v in given.items() if k != "error_bound"}, rel=1e-9
    )
    # The bound is that of what fedrot then averages, the consensus.
    consensus = measure(states, None, method="fedrot-consensus")
    assert row["error_bound"] == consensus["error_bound"] < measure(states, states[2])["error_bound"]
    assert measure(states[:1], None, weights=[1]) == {"error_bound": 0}


def test_many_adapters_are_measured_some_at_a_time(monkeypatch):
    reference, states = turned_clients(KINDS["linear"], 3)
    whole = measure(states, reference)
    monkeypatch.setattr("fedrot.simulation.geometry._ENTRIES", 1)
    assert measure(states, reference) == pytest.approx(whole, rel=1e-9)
