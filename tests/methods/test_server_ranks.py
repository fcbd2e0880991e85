"""Ranks that the server chooses: by energy (FLoRIST), for each client (HLoRA) and by number, against dense SVDs."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel

import fedrot
from fedrot import FedRotAggregator

from ..definitions import assert_same_bits
from ..dense import KIND, UNEQUAL, WEIGHTS, best, dense, lora_config, mean_update, modules
from ..mixtures import EXPERTS, TIED, adapted, clients, deltas
from ..peft_models import KINDS, base_model, client_updates
from ..refusals import refused

close = {"rtol": 1e-10, "atol": 1e-10}
CONFIGS = [lora_config(kind) for kind in UNEQUAL]


def under_its_own_configuration(result):
    """module → s·B·A of a result, as PEFT has it under the result's own configuration."""
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    own = replace(KIND, config=KIND.config | {name: result.config[name] for name in names if name in result.config})
    return dense(own, result.state_dict)


def ranks_of(result):
    return {key: len(x) for key, x in result.state_dict.items() if "lora_A" in key}


def flexlora(updates, configs=CONFIGS, **options):
    return fedrot.aggregate(updates, WEIGHTS.tolist(), method="flexlora", configs=configs, **options)


def test_all_of_the_energy_is_the_mean_update_itself(unequal):
    result = flexlora(unequal, energy=1)
    mean = mean_update(UNEQUAL, unequal)
    for name, got in under_its_own_configuration(result).items():
        torch.testing.assert_close(got, mean[name], **close)
        assert len(result.state_dict[f"{name}.lora_A.weight"]) == torch.linalg.matrix_rank(mean[name])
    assert result.report.relative_error < 1e-7 and result.config["use_rslora"]
    assert [a.rank for a in result.report.adapters] == list(ranks_of(result).values())


@pytest.mark.parametrize("energy", [0.2, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_the_rank_is_the_least_of_that_energy(unequal, energy):
    result = flexlora(unequal, energy=energy)
    mean = mean_update(UNEQUAL, unequal)
    for name, got in under_its_own_configuration(result).items():
        squares = torch.linalg.svdvals(mean[name]).square()
        k = len(result.state_dict[f"{name}.lora_A.weight"])
        kept = squares.cumsum(0) / squares.sum()
        assert kept[k - 1] >= energy and (k == 1 or kept[k - 2] < energy)
        torch.testing.assert_close(got, best(mean[name], k), **close)


def test_without_an_update_one_rank_is_left():
    updates = [{key: torch.zeros_like(x) for key, x in u.items()} for u in client_updates(KIND, 2)]
    result = fedrot.aggregate(updates, method="flexlora", configs=lora_config(KIND), energy=1)
    assert set(ranks_of(result).values()) == {1} and not any(x.any() for x in result.state_dict.values())


@pytest.mark.parametrize("server_rank", [1, 3, 11, 40])
def test_a_rank_by_number(unequal, server_rank):
    """Of more rows than the mean has directions the last are zero, and energy is bounded by the rank."""
    result, mean = flexlora(unequal, server_rank=server_rank), mean_update(UNEQUAL, unequal)
    assert set(ranks_of(result).values()) == {server_rank} and result.config["r"] == server_rank
    for name, got in under_its_own_configuration(result).items():
        torch.testing.assert_close(got, best(mean[name], server_rank), **close)
    bounded = flexlora(unequal, server_rank=server_rank, energy=1)
    full = ranks_of(flexlora(unequal, energy=1))
    assert ranks_of(bounded) == {key: min(k, server_rank) for key, k in full.items()}


def test_every_client_gets_the_best_update_of_its_rank(unequal):
    """HLoRA: the server keeps all, and each client the leading directions of it."""
    mean = mean_update(UNEQUAL, unequal)
    for options in ({"energy": 1}, {"server_rank": 13}, {}):
        result = flexlora(unequal, **options)
        for kind in UNEQUAL:
            own = fedrot.truncate((result.state_dict, result.config), lora_config(kind))
            for name, got in dense(kind, own).items():
                k = len(modules(kind, own)[name][0])
                torch.testing.assert_close(got, best(mean[name], k), rtol=1e-8, atol=1e-8)


def test_rounds_go_on_from_what_clients_got(unequal):
    aggregator = FedRotAggregator(method="flexlora", energy=0.9)
    given = list(zip(unequal, CONFIGS, strict=True))
    for _ in range(2):
        result = aggregator.aggregate(given, WEIGHTS.tolist())
        whole = result.state_dict, result.config
        assert aggregator.state_dict()["config"] == result.config
        own = [replace(k, config=k.config | {"r": 1, "rank_pattern": {}}) for k in UNEQUAL]
        given = [(fedrot.truncate(whole, lora_config(kind)), lora_config(kind)) for kind in own]
    assert set(ranks_of(result).values()) == {1}  # all clients had the same direction


@pytest.mark.parametrize("name", ["convolution", "embedding", "DoRA", "modules to save", "rsLoRA", "bfloat16", "LoRA bias"])
def test_peft_loads_a_result_of_chosen_ranks(name, tmp_path):
    kind = KINDS[name]
    updates = client_updates(kind, 3)
    result = fedrot.aggregate(updates, method="flexlora", configs=lora_config(kind), energy=0.8)
    assert len(set(ranks_of(result).values())) >= 1
    result.save(tmp_path / "merged")
    model = PeftModel.from_pretrained(base_model(kind), str(tmp_path / "merged"), autocast_adapter_dtype=False)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and m.scaling}
    before = {n: m.scaling["default"] for n, m in peft_layers(kind).items()}
    assert {n: m.scaling["default"] for n, m in layers.items()} == pytest.approx(before)


def peft_layers(kind):
    from ..peft_models import peft_model

    return {n: m for n, m in peft_model(kind).named_modules() if hasattr(m, "lora_A") and m.scaling}


def test_copies_of_tied_adapters_have_the_chosen_rank(tmp_path):
    base, config, _ = next(iter(TIED.values()))
    lora, updates = clients(base, config, 3)
    result = fedrot.aggregate(updates, method="flexlora", configs=lora, energy=0.9)
    result.save(tmp_path / "merged")
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(base().double(), str(tmp_path / "merged"), autocast_adapter_dtype=False)
    each = [deltas(adapted(base, config, u)) for u in updates]
    for name, got in deltas(model).items():
        mean = sum(d[name] for d in each) / 3
        assert (got - mean).norm().square() <= 0.1 * mean.norm().square()


def test_experts_share_a_rank():
    base, config, _ = next(iter(EXPERTS.values()))
    lora, updates = clients(base, config, 2)
    with refused("energy=0.9", "experts", "server_rank="):
        fedrot.aggregate(updates, method="flexlora", configs=lora, energy=0.9)
    result = fedrot.aggregate(updates, method="flexlora", configs=lora, server_rank=9)
    assert {a.rank for a in result.report.adapters} == {9}


def test_a_changed_rank_needs_the_scaling(updates):
    for options in ({"energy": 0.9}, {"server_rank": 5}):
        with refused("flexlora changes the ranks", "scaling s", "configs="):
            fedrot.aggregate(updates, method="flexlora", **options)


def test_an_overflow_is_named_with_energy():
    updates = [{key: x.float() * 1e25 for key, x in u.items()} for u in client_updates(KIND, 2)]
    with refused("overflows"):
        fedrot.aggregate(updates, method="flexlora", energy=0.9, configs=lora_config(KIND))


def test_the_same_inputs_give_the_same_bits(unequal):
    first, again = (flexlora(unequal, energy=0.9) for _ in range(2))
    assert_same_bits(first.state_dict, again.state_dict)
    assert first.config == again.config


@pytest.mark.parametrize(
    ("options", "users"),
    [
        ({"method": "fedit", "energy": 0.5}, "flexlora"),
        ({"method": "fedrot", "server_rank": 5}, "flexlora"),
        ({"method": "fedex-lora", "collapse": "raflora"}, "flexlora"),
    ],
)
def test_options_of_other_methods_are_refused(options, users):
    (method, (name, value)) = options["method"], list(options.items())[1]
    with refused(f"{name}={value!r}", method, users, error=ValueError):
        FedRotAggregator(**options)
