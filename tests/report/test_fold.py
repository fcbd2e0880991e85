"""Base updates go into the base weights of real PEFT models, and the model then computes the mean update exactly."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

import fedrot

from ..definitions import assert_same_bits
from ..peft_models import KINDS, base_model, client_updates
from ..refusals import refused

FOLDABLE = [
    "linear",
    "GPT-2 Conv1D",
    "embedding",
    "embedding, saved with its base",
    "convolution",
    "rank and alpha pattern",
    "rsLoRA",
    "modules to save",
    "trainable tokens",
]
SHARES = [0.2, 0.3, 0.5]


def merged_weights(model):
    """name → weight of the base model once the adapter is merged."""
    return dict(copy.deepcopy(model).merge_and_unload().named_parameters())


def adapted(kind, update):
    model = get_peft_model(base_model(kind), LoraConfig(**{"r": 4, "lora_alpha": 8} | kind.config))
    set_peft_model_state_dict(model, update)
    return model


def mean_weights(kind, updates):
    """Σ pᵢ of the clients' merged weights: base + Σ pᵢsᵢBᵢAᵢ, and the mean of everything else."""
    of_clients = [merged_weights(adapted(kind, u).double()) for u in updates]
    return {name: sum(p * w[name].detach() for p, w in zip(SHARES, of_clients, strict=True)) for name in of_clients[0]}


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
@pytest.mark.parametrize("name", FOLDABLE)
def test_the_folded_model_has_the_mean_of_the_clients_weights(name, method, tmp_path):
    kind = KINDS[name]
    updates = client_updates(kind, 3)
    model = adapted(kind, updates[0]).double()
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    result = fedrot.aggregate(updates, SHARES, method=method, configs=model.peft_config["default"])
    fedrot.fold(model, result)
    set_peft_model_state_dict(model, result.state_dict)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    assert model.active_adapters == ["default"] and list(model.peft_config) == ["default"]
    got = merged_weights(model)
    for weight, expected in mean_weights(kind, updates).items():
        torch.testing.assert_close(got[weight], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item(), msg=weight)

    # From folders too, without fedrot: PEFT merges the base update, then loads the adapter.
    fedrot.write_adapter(tmp_path / "base", result.base_update, result.base_config)
    fedrot.write_adapter(tmp_path / "adapter", result.state_dict, result.config)
    base = PeftModel.from_pretrained(base_model(kind).double(), str(tmp_path / "base")).merge_and_unload()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    again = merged_weights(loaded)
    for weight, expected in got.items():
        torch.testing.assert_close(again[weight], expected, rtol=1e-5, atol=1e-5, msg=weight)


def test_a_square_layer_is_not_transposed():
    """The residual of a square nn.Linear fits both ways round; one of them is wrong."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    keys = [f"base_model.model.0.lora_{f}.weight" for f in "AB"]
    updates = [dict(zip(keys, (torch.randn(2, 6), torch.randn(6, 2)), strict=True)) for _ in range(3)]
    result = fedrot.aggregate(updates, method="flora", configs=model.peft_config["default"])
    fedrot.fold(model, result)
    expected = base[0].weight + sum(2 * u[keys[1]] @ u[keys[0]] / 3 for u in updates)
    torch.testing.assert_close(model.base_model.model[0].base_layer.weight, expected)


def test_folding_leaves_all_else_as_it_was():
    kind = KINDS["linear"]
    updates = client_updates(kind, 2)
    model = adapted(kind, updates[0]).requires_grad_(False)
    frozen_A = [p for n, p in model.named_parameters() if "lora_B" in n]
    for p in frozen_A:
        p.requires_grad_(True)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapter = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    random = torch.get_rng_state()
    result = fedrot.aggregate(updates, method="flora", configs=model.peft_config["default"])
    fedrot.fold(model, result)
    assert torch.equal(torch.get_rng_state(), random)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert_same_bits({n: p for n, p in model.named_parameters() if n in adapter}, adapter)

    key = next(iter(result.base_update))
    result.base_update[key] = result.base_update[key][:, :-1]
    with refused("base update", key, "the model has"):
        fedrot.fold(model, result)
    assert list(model.peft_config) == ["default"]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_modules_whose_names_end_alike_are_told_apart():
    torch.manual_seed(0)
    inner = torch.nn.ModuleDict({"fc": torch.nn.Linear(6, 5)})
    base = torch.nn.ModuleDict(
        {"fc": torch.nn.Linear(6, 7), "block": inner, "other": torch.nn.ModuleDict({"fc": torch.nn.Linear(6, 5)})}
    )
    config = LoraConfig(r=2, target_modules=r"fc|block\.fc", rank_pattern={"^fc": 1})
    model = get_peft_model(copy.deepcopy(base), config)
    update = {n: torch.randn(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    result = fedrot.aggregate([update] * 2, method="flora", configs=config)
    fedrot.fold(model, result)
    weight = model.base_model.model["fc"].base_layer.weight
    A, B = (update[f"base_model.model.fc.lora_{f}.default.weight"] for f in "AB")
    torch.testing.assert_close(weight, base["fc"].weight + 8 * B @ A)
    torch.testing.assert_close(model.base_model.model["other"]["fc"].weight, base["other"]["fc"].weight)


def test_nothing_is_folded_where_nothing_is_left_for_the_base():
    kind = KINDS["linear"]
    updates = client_updates(kind, 2)
    model = adapted(kind, updates[0])
    before = {n: p.clone() for n, p in model.named_parameters()}
    fedrot.fold(model, fedrot.aggregate(updates))
    assert_same_bits(dict(model.named_parameters()), before)
