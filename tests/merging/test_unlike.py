"""Adapters of unlike names, ties and vocabularies: merged as what they are, or refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import fedrot
from fedrot.cli import main

from ..mixtures import adapted, clients, tied_llama
from ..mixtures import deltas as peft_deltas
from ..peft_models import KINDS, client_updates, llama, peft_model
from ..refusals import refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized"),
]


UNLIKE_TIED = [(4, {"rank_pattern": {"q_proj": 2}}), (3, {"rank_pattern": {"q_proj": 5}})]


def names_of(old, new, update):
    return {key.replace(f"base_model.model.{old}", f"base_model.model.{new}"): x for key, x in update.items()}


RENAMED = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}


def llama_update(seed):
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(**RENAMED))
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(x.shape, generator=generator) for key, x in model.state_dict().items() if "lora_" in key}
    return {key.replace(".default", ""): x for key, x in state.items()}, model.peft_config["default"]


def test_unlike_names_are_refused_and_renamed(tmp_path, capsys):
    (first, config), (second, _) = llama_update(1), llama_update(2)
    moved = names_of("model.layers", "model.language_model.layers", second)
    with refused("client 1", "client 0", "{'model.language_model': 'model'}", "--rename model.language_model=model"):
        fedrot.merge([(first, config), (moved, config)])
    same = fedrot.merge([(first, config), (second, config)])
    for renaming in ({"model.language_model": "model"}, {"model.language_model.": "model."}):
        result = fedrot.merge([(first, config), (moved, config)], rename=renaming)
        assert all(torch.equal(result.state_dict[key], x) for key, x in same.state_dict.items())
        assert result.config == same.config
    apart = fedrot.merge([(first, config), (moved, config)], rename={})
    assert len(apart.report.adapters) == 2 * len(same.report.adapters)
    with refused("backbone"):
        fedrot.merge([(first, config)], rename={"backbone": "model"})
    with refused("one name"):
        fedrot.merge([(first | moved, config)], rename={"model.language_model": "model"})
    folders = [str(tmp_path / name) for name in ("0", "1")]
    for folder, update in zip(folders, (first, moved), strict=True):
        fedrot.write_adapter(
            folder, update, config.to_dict() | {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}
        )
    command = ["merge", *folders, "--output", str(tmp_path / "out")]
    assert main(command) == 1 and "--rename" in capsys.readouterr().err
    assert main([*command, "--rename", "model.language_model=model"]) == 0
    saved, _ = fedrot.read_adapter(tmp_path / "out")
    assert all(torch.equal(saved[key], x) for key, x in same.state_dict.items())
    with pytest.raises(SystemExit):
        main([*command, "--rename", "model"])


def test_a_prefix_that_only_one_adapter_has_is_refused():
    (first, config), (second, _) = llama_update(1), llama_update(2)
    bare = {key.removeprefix("base_model.model."): x for key, x in second.items()}  # as Transformers returns it
    with refused("client 0", "client 1", "base_model.model."):
        fedrot.merge([(first, config), (bare, config)])


def test_unlike_bases_warn():
    pairs = [
        (u, c.to_dict() | {"base_model_name_or_path": name})
        for (u, c), name in zip(map(llama_update, (1, 2)), "ab", strict=True)
    ]
    with pytest.warns(UserWarning, match="base models a, b"):
        fedrot.merge(pairs)


def test_vocabularies_of_unlike_sizes_name_both_shapes():
    kind = KINDS["embedding, saved with its base"]
    update = client_updates(kind, 1)[0]
    config = peft_model(kind).peft_config["default"]
    (key,) = (key for key in update if key.endswith("base_layer.weight"))
    rows = update[key].shape[0]
    wider = {k: torch.cat([x, x[:2]]) if len(x) == rows else x for k, x in update.items()}
    wider = {k: torch.cat([x, x[:, :2]], 1) if "embedding_A" in k else x for k, x in wider.items()}
    with refused("client 1", tuple(wider[key].shape), tuple(update[key].shape)):
        fedrot.merge([(update, config), (wider, config)])
    with refused("client 1", "embed_tokens", f"(4, {rows + 2})", f"(4, {rows})"):
        fedrot.aggregate([update, wider])


def test_tied_adapters_of_unlike_ranks_load(tmp_path):
    config = {"lora_alpha": 4, "ensure_weight_tying": True}
    both = config | {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    tied, (first,) = clients(tied_llama, both, 1)
    wide, (second,) = clients(tied_llama, {"r": 8, "target_modules": ["q_proj", "v_proj"]}, 1)
    result = fedrot.merge([(first, tied), (second, wide)])
    result.save(tmp_path / "merged")
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(tied_llama().double(), tmp_path / "merged", autocast_adapter_dtype=False)
    alone = peft_deltas(
        adapted(tied_llama, config | {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}, first)
    )
    for name, x in peft_deltas(model).items():
        if "embed_tokens" in name or "lm_head" in name:
            torch.testing.assert_close(x, alone[name] / 2, rtol=1e-9, atol=1e-9)
    # Clients of unlike ranks and no reference too: the configuration spells both modules out.
    others = [config | {"r": r, "target_modules": ["lm_head", "q_proj"]} | own for r, own in UNLIKE_TIED]
    loras, updates = zip(*(clients(tied_llama, kind, 1, seed) for seed, kind in enumerate(others)), strict=True)
    result = fedrot.aggregate([u for (u,) in updates], method="flexlora", configs=list(loras))
    fields = {field: result.config[field] for field in ("r", "rank_pattern", "alpha_pattern")}
    loaded = adapted(tied_llama, others[0] | fields, result.state_dict)
    assert all(layer.lora_A for name, layer in loaded.named_modules() if name.endswith("lm_head"))


def test_adapters_without_a_common_module_are_asked_about():
    (first, config), (second, _) = llama_update(1), llama_update(2)
    parts = [{k: x for k, x in u.items() if name in k} for u, name in ((first, "q_proj"), (second, "v_proj"))]
    with pytest.warns(UserWarning, match="no module in common"):
        fedrot.merge([(part, config) for part in parts])


def test_renaming_leaves_what_has_the_new_name():
    (first, config), (second, _) = llama_update(1), llama_update(2)
    moved = names_of("model.layers", "model.language_model.layers", second)
    same = fedrot.merge([(moved, config), (names_of("model.layers", "model.language_model.layers", first), config)])
    result = fedrot.merge([(moved, config), (first, config)], rename={"model": "model.language_model"})
    assert result.state_dict.keys() == same.state_dict.keys()
    assert all(torch.equal(result.state_dict[key], x) for key, x in same.state_dict.items())
    with refused("--rename"):  # a renaming that does not help
        fedrot.merge([(moved, config), (first, config)], rename={"model.layers": "model.decoder.layers"})


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_tied_adapter_and_one_of_other_modules_load(order, tmp_path):
    tied, (first,) = clients(tied_llama, {"r": 4, "target_modules": ["lm_head"], "ensure_weight_tying": True}, 1)
    plain, (second,) = clients(tied_llama, {"r": 4, "target_modules": ["q_proj"]}, 1)
    pairs = [(first, tied), (second, plain)]
    fedrot.merge([pairs[i] for i in order], normalize=False).save(tmp_path / "merged")
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(tied_llama().double(), tmp_path / "merged", autocast_adapter_dtype=False)
    found = peft_deltas(model)
    expected = peft_deltas(adapted(tied_llama, {"r": 4, "target_modules": ["lm_head"], "ensure_weight_tying": True}, first))
    assert all(torch.allclose(found[name], x, atol=1e-9) for name, x in expected.items()) and len(found) == 3


def test_a_tied_adapter_and_one_on_the_embedding_alone_are_refused():
    tied, (first,) = clients(tied_llama, {"r": 4, "target_modules": ["lm_head"], "ensure_weight_tying": True}, 1)
    plain, (second,) = clients(tied_llama, {"r": 4, "target_modules": ["embed_tokens"]}, 1)
    for pairs in ([(first, tied), (second, plain)], [(second, plain), (first, tied)]):
        with refused("embed_tokens.lora_embedding", "(4, 48)", "ensure_weight_tying"):
            fedrot.merge(pairs)


def test_an_adapter_without_one_factor_is_refused():
    (first, config), (second, _) = llama_update(1), llama_update(2)
    for factor in "AB":
        key = next(key for key in second if f"q_proj.lora_{factor}" in key)
        with refused("client 1", "q_proj.lora_", "send both factors"):
            fedrot.merge([(first, config), ({k: x for k, x in second.items() if k != key}, config)])
    wide = {k: torch.ones(16, 5) if "q_proj.lora_B" in k else x for k, x in second.items()}
    with refused("client 1", "q_proj", "(16, 5)"):
        fedrot.merge([(first, config), (wide, config)])
