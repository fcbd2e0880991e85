"""FedMomentum in dense float64: the adapter is the truncated SVD, and adapter and base together are the mean up to τ."""

import pytest
import torch

import fedrot

from ..definitions import assert_same_bits
from ..dense import KIND, UNEQUAL, WEIGHTS, base_change, best, lora_config, mean_update
from ..peft_models import KINDS, client_updates, factor_keys
from ..refusals import refused

CONFIGS = [lora_config(kind) for kind in UNEQUAL]
S = 3 / 6**0.5  # of the widest client, which the result has


def fedmomentum(updates, configs=CONFIGS, **options):
    return fedrot.aggregate(updates, WEIGHTS.tolist(), method="fedmomentum", configs=configs, **options)


def adapter(result, name):
    return S * result.state_dict[f"{name}.lora_B.weight"] @ result.state_dict[f"{name}.lora_A.weight"]


@pytest.mark.parametrize("energy", [None, 0.5, 0.95, 1 - 1e-9, 1])
def test_adapter_and_base_are_the_mean_up_to_the_energy(unequal, energy):
    result = fedmomentum(unequal, energy=energy)
    changed, threshold = base_change(result), 0.9999 if energy is None else energy
    for name, M in mean_update(UNEQUAL, unequal).items():
        squares = torch.linalg.svdvals(M).square()
        left_out = squares.sum() - squares.cumsum(0)
        k = max(6, int((left_out > (1 - threshold) * squares.sum() + 1e-15 * squares.sum()).sum()) + 1)
        torch.testing.assert_close(adapter(result, name), best(M, 6), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(adapter(result, name) + changed[name], best(M, k), rtol=1e-10, atol=1e-10)
        lost = (M - adapter(result, name) - changed[name]).norm().square()
        assert lost <= (1 - threshold) * M.norm().square() + 1e-20
        assert len(result.base_update[f"{name}.lora_A.weight"]) == max(k - 6, 1)
    assert result.report.relative_error <= (1 - threshold) ** 0.5 + 1e-7


def test_the_adapter_of_flexlora_is_its_adapter(unequal):
    plain = fedrot.aggregate(unequal, WEIGHTS.tolist(), method="flexlora", configs=CONFIGS)
    result = fedmomentum(unequal)
    for key, x in plain.state_dict.items():
        torch.testing.assert_close(result.state_dict[key], x, rtol=1e-9, atol=1e-9)
    assert result.config == plain.config


@pytest.mark.parametrize("name", ["linear", "GPT-2 Conv1D", "convolution", "embedding", "rsLoRA", "bfloat16", "float16"])
def test_with_all_of_the_energy_every_kind_is_exact(name):
    """What half precision loses of the adapter is in the base."""
    kind = KINDS[name]
    updates = client_updates(kind, 3)
    result = fedrot.aggregate(updates, method="fedmomentum", configs=lora_config(kind), energy=1)
    assert result.report.relative_error < 1e-5
    for key_A, key_B in factor_keys(result.base_update):
        s = 4.0 if name == "rsLoRA" else 2.0
        pairs = [(s / 3, u) for u in updates] + [(-s, result.state_dict), (-1, result.base_update)]
        left = sum(c * u[key_B].double().flatten(1) @ u[key_A].double().flatten(1) for c, u in pairs)
        size = sum(abs(c) * (u[key_B].double().flatten(1) @ u[key_A].double().flatten(1)).norm() for c, u in pairs)
        assert left.norm() < 1e-5 * size


def test_a_mean_of_the_adapters_rank_leaves_nothing_for_the_base():
    (update,) = client_updates(KIND, 1)
    result = fedrot.aggregate([update] * 3, method="fedmomentum", configs=lora_config(KIND))
    assert result.base_update and not any(
        (result.base_update[b] @ result.base_update[a]).any() for a, b in factor_keys(result.base_update)
    )


def test_what_it_needs_is_named(updates):
    with refused("fedmomentum adds s·B·A to the base weights", "configs="):
        fedrot.aggregate(updates, method="fedmomentum")
    huge = [{key: x.float() * 1e25 for key, x in u.items()} for u in updates]
    with refused("overflows"):
        fedrot.aggregate(huge, method="fedmomentum", configs=lora_config(KIND))


def test_the_same_inputs_give_the_same_bits(unequal):
    first, again = fedmomentum(unequal), fedmomentum(unequal)
    assert_same_bits(first.state_dict, again.state_dict)
    assert_same_bits(first.base_update, again.base_update)
