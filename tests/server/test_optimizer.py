"""Server optimizers step as FedOpt's formulas say, on the rotated mean, and go on after a restart."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedrot
from fedrot import FedRotAggregator, ServerOptimizer

from ..definitions import assert_same_bits
from ..peft_models import KINDS, client_updates, factor_keys, turned_clients
from ..refusals import HEAD, LINEAR, A, refused

KIND = KINDS["float64"]
LR = {"momentum": 0.7, "adam": 0.05}


def formula(name, reference, means):
    """FedAvgM and FedAdam in float64, tensor by tensor; returns the adapter after each round."""
    x, m, v, after = dict(reference), {}, {}, []
    for t, mean in enumerate(means, start=1):
        for key in x:
            g = after[-1][key] - mean[key] if after else reference[key] - mean[key]
            if name == "momentum":
                m[key] = 0.9 * m.get(key, 0) + g
                x[key] = x[key] - LR[name] * m[key]
            else:
                m[key], v[key] = 0.9 * m.get(key, 0) + 0.1 * g, 0.999 * v.get(key, 0) + 0.001 * g**2
                x[key] = x[key] - LR[name] * (m[key] / (1 - 0.9**t)) / ((v[key] / (1 - 0.999**t)).sqrt() + 1e-8)
        after.append(dict(x))
    return after


def rounds_of_updates(n=3):
    return [turned_clients(KIND, 3, seed=seed)[1] for seed in range(n)]


@pytest.mark.parametrize("method", ["fedit", "fedrot"])
@pytest.mark.parametrize("name", LR)
def test_it_steps_along_the_rotated_mean(name, method):
    reference = turned_clients(KIND, 3)[0]
    aggregator = FedRotAggregator(reference, method=method, server_optimizer=ServerOptimizer(name, LR[name]))
    means, results, start = [], [], reference
    for round, updates in enumerate(rounds_of_updates()):
        means.append(fedrot.aggregate(updates, None, start, method=method, round=round).state_dict)
        results.append(aggregator.aggregate(updates).state_dict)
        start = results[-1]
    assert len(results) == 3
    for got, expected in zip(results, formula(name, reference, means), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LR)
def test_it_goes_on_after_a_restart_to_the_bit(name, tmp_path):
    reference = turned_clients(KIND, 3)[0]
    whole = FedRotAggregator(reference, server_optimizer=ServerOptimizer(name, LR[name]))
    *before, last = rounds_of_updates(4)
    for updates in before:
        whole.aggregate(updates)
    save_file(whole.server_optimizer.state_dict(), tmp_path / "state")
    again = FedRotAggregator(whole.reference, round=whole.round, server_optimizer=ServerOptimizer(name, LR[name]))
    again.server_optimizer.load_state_dict(load_file(tmp_path / "state"))
    assert again.server_optimizer.state_dict().keys() == whole.server_optimizer.state_dict().keys()
    expected, got = whole.aggregate(last).state_dict, again.aggregate(last).state_dict
    assert_same_bits(got, expected)


def test_added_one_by_one_too():
    reference, updates = turned_clients(KIND, 3)
    results = []
    for at_once in (True, False):
        aggregator = FedRotAggregator(reference, round=1, server_optimizer=ServerOptimizer("adam", 0.1))
        if at_once:
            results.append(aggregator.aggregate(updates).state_dict)
            continue
        for update in updates:
            aggregator.add(update)
        results.append(aggregator.finish().state_dict)
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_a_frozen_factor_and_its_moments_stay():
    base = client_updates(KIND, 1)[0]
    aggregator = FedRotAggregator(base, method="rolora", server_optimizer=ServerOptimizer("adam", 0.1))
    for round in range(4):
        trained = "AB"[(round + 1) % 2]
        start = aggregator.reference
        keys = [pair["AB".index(trained)] for pair in factor_keys(base)]
        clients = [{**start, **{key: start[key] + 1 for key in keys}} for _ in range(2)]
        result = aggregator.aggregate(clients).state_dict
        for key_A, key_B in factor_keys(base):
            moved, still = (key_A, key_B) if trained == "A" else (key_B, key_A)
            torch.testing.assert_close(result[moved] - start[moved], torch.full_like(start[moved], 0.1))
            assert torch.equal(result[still], start[still])


def test_small_steps_add_up_in_half_precision():
    kind = KINDS["bfloat16"]
    reference = {key: torch.ones_like(x) for key, x in client_updates(kind, 1)[0].items()}
    aggregator = FedRotAggregator(reference, method="fedit", server_optimizer=ServerOptimizer("adam", 1e-3))
    for _ in range(20):  # each below half of what bfloat16 can tell apart at 1
        result = aggregator.aggregate([{key: x + 1 for key, x in aggregator.reference.items()}])
    assert result.state_dict
    for x in result.state_dict.values():
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.float(), torch.full(x.shape, 1.02), rtol=0, atol=0.004)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="momentum or adam, got 'sgd'"):
        ServerOptimizer("sgd", 1.0)
    with pytest.raises(ValueError, match="got 'none'; for none pass server_optimizer=None"):
        ServerOptimizer("none", 1.0)
    for lr in (0, "0.1", True, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"must be a positive number, got {lr!r}"):
            ServerOptimizer("adam", lr)
    for beta in (1, -0.1, "0.9", True, float("nan"), None):
        with pytest.raises(ValueError, match=f"beta must be a number from 0 to below 1, got {beta!r}"):
            ServerOptimizer("momentum", 1.0, beta)
    for given in ("momentum", "none", "adam", ServerOptimizer, torch.optim.SGD):
        with refused("server_optimizer", repr(given), 'fedrot.ServerOptimizer("momentum", lr=…)', "None", error=ValueError):
            FedRotAggregator(server_optimizer=given)
    for method in ("flora", "flexlora", "fedex-lora", "fedmomentum", "fedsvd", "flora-na", "glora", "random-rotation"):
        with pytest.raises(ValueError, match=f"{method}'s result is no mean"):
            FedRotAggregator(method=method, server_optimizer=ServerOptimizer("adam", 1.0))
    updates = client_updates(KIND, 2)
    reference = {key: x for key, x in updates[0].items() if "lora" in key}
    with refused("the reference lacks", "classifier", "steps from it"):
        FedRotAggregator(reference, server_optimizer=ServerOptimizer("adam", 1.0)).aggregate(updates)
    key = "base_model.model.classifier.bias"
    for x, why in ((torch.zeros(7).double(), "shape (7,)"), (updates[0][key] * torch.nan, "NaN")):
        wrong = {**updates[0], key: x}
        with refused("the reference, " + key, why):
            FedRotAggregator(wrong, server_optimizer=ServerOptimizer("adam", 1.0)).aggregate(updates)


def test_the_state_of_another_optimizer_or_adapter_is_refused():
    reference, updates = turned_clients(KIND, 2)
    aggregator = FedRotAggregator(reference, server_optimizer=ServerOptimizer("adam", 0.1))
    aggregator.aggregate(updates)
    state = aggregator.state_dict()
    with refused("is not of the state of a server optimizer of the name momentum", error=ValueError):
        ServerOptimizer("momentum", 0.1).load_state_dict(state["server_optimizer"])
    # Known only at the next step, where the optimizer is loaded by itself.
    cut = {name: x if name.startswith("step.") else x.flatten()[:1] for name, x in state["server_optimizer"].items()}
    other = FedRotAggregator(reference, server_optimizer=ServerOptimizer("adam", 0.1))
    other.server_optimizer.load_state_dict(cut)
    with refused("the server optimizer's state has", "(1,), but the round's mean has", error=ValueError):
        other.aggregate(updates)
    assert_same_bits(other.server_optimizer.state_dict(), cut)


VALUE, MOMENT = f"value.{HEAD}", f"exp_avg.{HEAD}"
FOREIGN = {
    "another optimizer's": (lambda s: s | {f"momentum_buffer.{HEAD}": s[VALUE]}, [f"momentum_buffer.{HEAD}", "adam"]),
    "of another program": (lambda s: {"state": torch.ones(1)}, ["'state'", "adam", "state_dict()"]),
    "no tensor": (lambda s: s | {VALUE: 1.0}, [VALUE, "adam"]),
    "no name": (lambda s: s | {7: torch.ones(1)}, ["7", "adam"]),
    "no mapping": (lambda s: list(s.values()), ["list", "state_dict()"]),
    "a moment of another shape": (lambda s: s | {MOMENT: s[MOMENT][:1]}, [MOMENT, "(1, 16)", f"{VALUE} (3, 16)"]),
    "a moment without its value": (lambda s: {k: x for k, x in s.items() if k != VALUE}, [HEAD, f"no {VALUE}"]),
    "a moment is missing": (lambda s: {k: x for k, x in s.items() if k != MOMENT}, [f"lacks {MOMENT}"]),
    "NaN": (lambda s: s | {VALUE: s[VALUE] * torch.nan}, ["NaN"]),
    "another key": (lambda s: s | {"value.x": torch.ones(2)}, ["has x (2,)", "the state's reference lacks it"]),
    "another shape": (
        lambda s: {k: x[:1] if k.endswith(HEAD) and x.ndim else x for k, x in s.items()},
        [f"has {HEAD} (1, 16)", "the state's reference has (3, 16)"],
    ),
    "a factor is missing": (lambda s: {k: x for k, x in s.items() if not k.endswith(A)}, [f"lacks {A}"]),
}


@pytest.mark.parametrize(("change", "named"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_state_is_refused_on_loading(change, named):
    reference, updates = client_updates(LINEAR, 2)
    aggregator = FedRotAggregator(reference, method="fedit", server_optimizer=ServerOptimizer("adam", 0.1))
    aggregator.aggregate([updates])
    state = aggregator.state_dict()
    other = FedRotAggregator(updates, method="fedit", server_optimizer=ServerOptimizer("adam", 0.1))
    with refused(*named, error=ValueError):
        other.load_state_dict(state | {"server_optimizer": change(state["server_optimizer"])})
    assert (other.round, other.server_optimizer.state_dict()) == (0, {})
    assert_same_bits(other.reference, updates)
    other.load_state_dict(state)
    assert_same_bits(other.aggregate([updates]).state_dict, aggregator.aggregate([updates]).state_dict)


def test_beta_is_of_both_optimizers():
    reference, mean = client_updates(KIND, 2)
    for name, beta in (("momentum", 0.5), ("momentum", 0), ("adam", 0.5)):
        aggregator = FedRotAggregator(reference, method="fedit", server_optimizer=ServerOptimizer(name, 0.1, beta))
        x, m = dict(reference), dict.fromkeys(reference, 0)
        v = dict(m)
        for t in (1, 2, 3):
            aggregator.aggregate([mean])
            for key in x:
                g = x[key] - mean[key]
                if name == "momentum":
                    m[key] = beta * m[key] + g
                    x[key] = x[key] - 0.1 * m[key]
                else:
                    m[key], v[key] = beta * m[key] + (1 - beta) * g, 0.999 * v[key] + 0.001 * g**2
                    step = m[key] / (1 - beta**t) / ((v[key] / (1 - 0.999**t)).sqrt() + 1e-8)
                    x[key] = x[key] - 0.1 * step
        torch.testing.assert_close(aggregator.reference, x, rtol=1e-9, atol=1e-9)


def test_a_step_that_overflows_leaves_the_optimizer_as_it_was():
    kind = KINDS["float16"]
    reference, update = client_updates(kind, 2)
    aggregator = FedRotAggregator(reference, method="fedit", server_optimizer=ServerOptimizer("adam", 1e-3))
    aggregator.aggregate([update])
    aggregator.server_optimizer.lr = 1e9
    before, start = aggregator.server_optimizer.state_dict(), aggregator.reference
    for group in aggregator.server_optimizer._optimizer.param_groups:
        group["lr"] = 1e9
    with refused("overflows", "lower its learning rate"):
        aggregator.aggregate([update])
    after = aggregator.server_optimizer.state_dict()
    assert_same_bits(after, before)
    assert aggregator.reference is start
