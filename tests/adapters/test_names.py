"""Names of modules that wrappers and other versions change, and which pattern counts for a module."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

import fedrot
from fedrot.adapters.keys import parse_key
from fedrot.adapters.names import find_renaming

from ..peft_models import KINDS, Layers, client_updates, factor_keys, llama
from ..refusals import refused

LLAMA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def compiled(seed, **config):
    """A model whose layers were compiled before it was adapted, as training scripts do, and its adapter."""
    torch.manual_seed(0)
    model = llama()
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return randomized(get_peft_model(model, LoraConfig(**LLAMA | config)), seed)


def plain(seed, **config):
    torch.manual_seed(0)
    return randomized(get_peft_model(llama(), LoraConfig(**LLAMA | config)), seed)


def randomized(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    return model


def state(model):
    return {key: x.clone() for key, x in get_peft_model_state_dict(model).items()}


def test_compiled_and_plain_clients_are_one_federation(tmp_path):
    first, second = compiled(1), plain(2)
    assert all("_orig_mod" in key for key in state(first))
    same = fedrot.aggregate([state(plain(1)), state(second)])
    for pair in ([first, second], [second, first]):
        result = fedrot.aggregate([state(model) for model in pair], [1, 1], state(second))
        assert list(result.state_dict) == list(state(pair[0])) and "_orig_mod" not in str(result.report)
    mixed = fedrot.aggregate([state(first), state(second)])
    assert all(torch.equal(x, y) for x, y in zip(mixed.state_dict.values(), same.state_dict.values(), strict=True))
    # Folders too; what is written loads into a model that is not compiled.
    for name, model in (("0", first), ("1", second)):
        model.save_pretrained(tmp_path / name)
    result = fedrot.aggregate([tmp_path / "0", tmp_path / "1"])
    result.save(tmp_path / "out")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "out")
    found = state(loaded)
    assert found.keys() == state(second).keys()
    assert all(torch.equal(found[key], same.state_dict[key.replace("_orig_mod.", "")]) for key in found)


def test_patterns_of_whole_names_fit_compiled_modules():
    config = {
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2},
        "alpha_pattern": {r"^model\.layers\.0\.self_attn\.v_proj": 4},
    }
    updates = [state(plain(i, **config)) for i in range(2)]
    renamed = [{key.replace("layers.0.", "layers.0._orig_mod."): x for key, x in u.items()} for u in updates]
    lora = LoraConfig(**LLAMA | config, peft_type="LORA")
    want = fedrot.aggregate(updates, method="flora", configs=lora).base_update
    found = fedrot.aggregate(renamed, method="flora", configs=lora).base_update
    assert {key.replace("_orig_mod.", "") for key in found} == set(want)
    assert all(torch.equal(found[key], want[key]) for key in found)


@pytest.mark.parametrize(
    ("given", "saved"),
    [
        ("_orig_mod.base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_A.weight"),
        ("base_model.model.layers.0._orig_mod.q._orig_mod.lora_A.weight", "base_model.model.layers.0.q.lora_A.weight"),
        ("base_model.model.layers.0._fsdp_wrapped_module.q.lora_A.weight", "base_model.model.layers.0.q.lora_A.weight"),
        (
            "base_model.model.layers.0._checkpoint_wrapped_module.q.lora_B.weight",
            "base_model.model.layers.0.q.lora_B.weight",
        ),
        ("module.base_model.model.q.lora_A.weight", "base_model.model.q.lora_A.weight"),
        # These are modules' own names.
        ("base_model.model.module.q.lora_A.weight", "base_model.model.module.q.lora_A.weight"),
        ("base_model.model.my_orig_mod.q.lora_A.weight", "base_model.model.my_orig_mod.q.lora_A.weight"),
    ],
)
def test_wrappers_are_no_part_of_a_name(given, saved):
    assert parse_key(given)[0] == saved


def test_a_key_with_and_without_a_wrapper_is_refused(tmp_path):
    update = client_updates(KINDS["linear"], 1)[0]
    key = factor_keys(update)[0][0]
    wrapped = key.replace("base_model.", "_orig_mod.base_model.", 1)
    with refused("client 0", key, wrapped):
        fedrot.aggregate([update | {wrapped: update[key]}])


ATTENTION = {"r": 4, "lora_alpha": 8, "target_modules": ["attention", "linear"]}


@pytest.mark.parametrize(
    "own",
    [
        {"rank_pattern": {"attention": 2}, "alpha_pattern": {"attention": 6}},
        {"rank_pattern": {"^attention": 3}, "use_rslora": True},
        {"alpha_pattern": {"out_proj": 99}},  # fits no module that PEFT adapts
    ],
    ids=str,
)
def test_the_projection_of_an_attention_has_the_attentions_rank_and_alpha(own):
    torch.manual_seed(0)
    model = randomized(get_peft_model(Layers(), LoraConfig(**ATTENTION | own)), 1)
    layer = model.base_model.model.attention.base_layer.out_proj
    rank, s = layer.r["default"], layer.scaling["default"]
    lora, update = model.peft_config["default"], state(model)
    (key,) = (key for key in update if "out_proj.lora_A" in key)
    assert update[key].shape[0] == rank
    result = fedrot.aggregate([update], method="flora", configs=lora)
    B, A = result.base_update[key.replace("lora_A", "lora_B")], result.base_update[key]
    torch.testing.assert_close(B @ A, s * update[key.replace("lora_A", "lora_B")] @ update[key])
    # The base update does to the model what the client's adapter did.
    torch.manual_seed(0)
    other = get_peft_model(Layers(), LoraConfig(**ATTENTION | own)).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        before = model.eval().base_model.model.attention(x, x, x)[0]
        fedrot.fold(other, result)
        after = other.base_model.model.attention(x, x, x)[0]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_the_layer_of_number_zero_is_a_layer():
    configs = [LLAMA | {"layers_to_transform": 0}, LLAMA | {"layers_to_transform": [0]}]
    pairs = [(state(plain(i)), LoraConfig(**config, peft_type="LORA")) for i, config in enumerate(configs)]
    targets = fedrot.merge(pairs).config["target_modules"]
    assert isinstance(targets, str) and re.fullmatch(targets, "model.layers.0.self_attn.q_proj")
    assert not re.fullmatch(targets, "model.layers.1.self_attn.q_proj")


def specs_of(update):
    return fedrot.adapters.keys.describe(update, "it")[0]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("model.layers", "model.language_model.layers", ("model.language_model", "model")),
        ("model.layers", "backbone.layers", ("backbone", "model")),
        ("model.layers", "layers", ("", "model")),
        ("model.layers", "transformer.h", ("transformer.h", "model.layers")),
        ("self_attn.q_proj", "self_attn.query", None),
    ],
)
def test_names_that_differ_by_their_beginning_are_found(old, new, found):
    update = state(plain(1))
    other = {key.replace(f"base_model.model.{old}", f"base_model.model.{new}"): x for key, x in update.items()}
    if found:
        assert find_renaming(specs_of(other), specs_of(update)) == found
        with refused("client 1", "client 0", *(f"{name}.…" for name in found if name)):
            fedrot.aggregate([update, other])
    elif other.keys() != update.keys():
        assert find_renaming(specs_of(other), specs_of(update)) is None


def test_layers_of_other_numbers_are_other_modules():
    update = state(plain(1))
    other = {key.replace("layers.0", "layers.7"): x for key, x in update.items()}
    assert find_renaming(specs_of(other), specs_of(update)) is None


def test_convolutions_and_linear_layers_of_equal_size_are_stacked_apart():
    """The patch convolution of ViT-base has as many entries as a query layer."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 4), nn.Linear(48, 8)

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["conv", "linear"])
    updates = [state(randomized(get_peft_model(Patches(), config), i)) for i in range(3)]
    aligned = fedrot.align(updates[1], updates[0], strength=1.0)
    for name in ("conv", "linear"):
        A, B = (f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB")
        before, after = (u[B].flatten(1) @ u[A].flatten(1) for u in (updates[1], aligned))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    stream = fedrot.FedRotAggregator(updates[0])
    for update in updates:
        stream.add(update)
    whole = fedrot.aggregate(updates, reference=updates[0])
    torch.testing.assert_close(stream.finish().state_dict, whole.state_dict, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
@pytest.mark.parametrize("outside", [False, True])
def test_base_updates_fold_into_compiled_models(method, outside):
    config = {"rank_pattern": {"q_proj": 2}}
    updates = [state(plain(i, **config)) for i in range(2)]
    result = fedrot.aggregate(
        updates, reference=updates[0], method=method, configs=LoraConfig(**LLAMA | config, peft_type="LORA")
    )
    model, expected = compiled(0, **config), plain(0, **config)
    fedrot.fold(torch.compile(model, backend="eager") if outside else model, result)
    fedrot.fold(expected, result)
    found = {parse_key(name)[0]: p for name, p in model.named_parameters()}
    want = {parse_key(name)[0]: p for name, p in expected.named_parameters()}
    assert found.keys() == want.keys() and all(torch.equal(found[name], p) for name, p in want.items())
    assert any(
        not torch.equal(p, found[name]) for name, p in plain(0, **config).named_parameters() if "q_proj.base_layer" in name
    )
