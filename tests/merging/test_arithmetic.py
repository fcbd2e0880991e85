"""Weights of any sign and sums, one α, names, heads and previews of merges: against dense float64 arithmetic and PEFT."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import fedrot
from fedrot.cli import main

from ..dense import KIND
from ..mixtures import adapted, clients, tied_llama
from ..mixtures import deltas as peft_deltas
from ..peft_models import KINDS, base_model, bert, client_updates, llama, peft_model, save_folder
from ..refusals import HEAD, refused
from .test_merge import UNLIKE, deltas, mean_delta

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized"),
]
NO_HEAD = {"modules_to_save": None}
UNLIKE_TIED = [(4, {"rank_pattern": {"q_proj": 2}}), (3, {"rank_pattern": {"q_proj": 5}})]


@pytest.fixture
def unlike(tmp_path):
    """Folders of one base whose ranks, scalings and modules all differ; no head."""
    kinds = [replace(KIND, config=KIND.config | NO_HEAD | own) for own in UNLIKE]
    return [save_folder(kind, client_updates(kind, 1, seed)[0], tmp_path / f"own{seed}") for seed, kind in enumerate(kinds)]


def merged_deltas(result, folder):
    result.save(folder)
    return deltas(folder)


@pytest.mark.parametrize("method", ["flexlora", "fedrot-least-error"])
@pytest.mark.parametrize(
    ("weights", "normalize", "applied"),
    [
        ([1, -1, 0.5], False, [1, -1, 0.5]),
        ([1, 1, 1], False, [1, 1, 1]),
        ([3, -1, 2], True, [0.75, -0.25, 0.5]),
        ([-1, -1, -2], True, [0.25, 0.25, 0.5]),
        ([2, 0, -1], False, [2, 0, -1]),
        ([1e30, -2e30, 3e30], True, [0.5, -1, 1.5]),
    ],
)
def test_weights_of_any_sign_are_applied_as_they_are(unlike, tmp_path, method, weights, normalize, applied):
    result = fedrot.merge(unlike, weights, normalize=normalize, method=method, rank=13)
    expected = mean_delta([f for f, w in zip(unlike, applied, strict=True) if w], [w for w in applied if w])
    found = merged_deltas(result, tmp_path / "merged")
    assert found.keys() == expected.keys()
    lost = sum(float((found[name] - x).square().sum()) for name, x in expected.items()) ** 0.5
    norm = sum(float(x.square().sum()) for x in expected.values()) ** 0.5
    assert result.report.relative_error == pytest.approx(lost / norm, abs=1e-7)
    assert lost / norm < (1e-12 if method == "flexlora" else 0.9)
    assert result.report.weights == pytest.approx([w for w in applied if w])


def test_weights_that_cannot_be_normalized_say_how_to_add(unlike, tmp_path, capsys):
    with refused("1, -1 sum to zero", "--normalize no"):
        fedrot.merge(unlike, [1, -1, 0])
    for wrong in ([1, 2, torch.nan], [1, 2, float("inf")], [1, 2, "3"], [1, 2, True]):
        with refused("client 2"):
            fedrot.merge(unlike, wrong)
    with refused("all weights are zero"):
        fedrot.merge(unlike, [0, 0, 0])
    command = ["merge", *map(str, unlike[:2]), "--weights", "1", "-1", "--normalize", "no", "--rank", "8"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    expected, found = mean_delta(unlike[:2], [1, -1]), deltas(tmp_path / "out")
    assert all(torch.allclose(found[name], x, rtol=1e-9, atol=1e-9) for name, x in expected.items())
    record = json.loads((tmp_path / "out" / "aggregation.json").read_text("utf-8"))["options"]
    assert (record["weights"], record["normalize"], record["modules_to_save"]) == ([1, -1], False, "mean")


@pytest.mark.parametrize("alpha", [None, 7])
def test_the_result_has_one_alpha(unlike, tmp_path, alpha):
    """llama.cpp's converter reads one α, and takes α over each tensor's own rank for its scaling."""
    result = fedrot.merge(unlike, [1, 2, 5], alpha=alpha)
    config = result.config
    assert config["alpha_pattern"] == {} and not config["use_rslora"] and config["rank_pattern"]
    assert alpha is None or config["lora_alpha"] == alpha
    found = merged_deltas(result, tmp_path / "merged")
    state = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    for name, x in found.items():
        A, B = (state[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
        torch.testing.assert_close(config["lora_alpha"] / len(A) * B @ A, x, rtol=1e-6, atol=1e-7)


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


HEADS = KINDS["modules to save"]


@pytest.fixture
def with_and_without(tmp_path):
    """An adapter with a head, one with none, and the folder of the base model."""
    torch.manual_seed(0)
    base_model(HEADS).save_pretrained(tmp_path / "base")
    first, second = client_updates(HEADS, 2)
    config = peft_model(HEADS).peft_config["default"].to_dict() | {"target_modules": ["query", "value"]}
    less = {key: x for key, x in second.items() if "classifier" not in key}
    return [(first, config), (less, config | NO_HEAD)], tmp_path / "base"


def test_heads_that_an_adapter_lacks(with_and_without):
    pairs, base = with_and_without
    with refused("client 1", HEAD, "client 0", "(3, 16)", "--base", "first", "drop"):
        fedrot.merge(pairs)
    own = load_file(base / "model.safetensors")[HEAD.removeprefix("base_model.model.")]
    mean = fedrot.merge(pairs, [1, 3], base=base)
    torch.testing.assert_close(mean.state_dict[HEAD], (pairs[0][0][HEAD] + 3 * own) / 4)
    first = fedrot.merge(pairs[::-1], modules_to_save="first")
    assert torch.equal(first.state_dict[HEAD], pairs[0][0][HEAD])
    dropped = fedrot.merge(pairs, modules_to_save="drop")
    assert HEAD not in dropped.state_dict and dropped.config["modules_to_save"] is None
    for result in (mean, first):
        assert result.config["modules_to_save"] == ["classifier"]
    factors = [key for key in mean.state_dict if "lora" in key]
    assert all(torch.equal(dropped.state_dict[key], fedrot.merge(pairs, base=base).state_dict[key]) for key in factors)
    with refused("modules_to_save", error=ValueError):
        fedrot.merge(pairs, modules_to_save="last")


def test_a_head_has_no_mean_by_negative_weights(with_and_without):
    (first, _), _ = with_and_without
    with refused(HEAD, "(3, 16)", "negative", "first"):
        fedrot.merge([first, first], [2, -1])
    assert fedrot.merge([first, first], [2, -1], modules_to_save="first").state_dict[HEAD].equal(first[0][HEAD])
    summed = fedrot.merge([first, first], [2, 2], normalize=False)  # heads are never summed
    torch.testing.assert_close(summed.state_dict[HEAD], first[0][HEAD])


def test_a_base_that_is_none_is_named(with_and_without, tmp_path):
    pairs, base = with_and_without
    with refused("base", "nowhere"):
        fedrot.merge(pairs, base=tmp_path / "nowhere")
    weights = load_file(base / "model.safetensors")
    name = HEAD.removeprefix("base_model.model.")
    save_file(weights | {name: torch.ones(5, 16)}, base / "model.safetensors")
    with refused(name, "(5, 16)", "(3, 16)"):
        fedrot.merge(pairs, base=base)
    save_file({key: x for key, x in weights.items() if key != name}, base / "model.safetensors")
    with refused(name, str(base)):
        fedrot.merge(pairs, base=base)


def test_a_base_in_shards_is_read(with_and_without, tmp_path):
    pairs, base = with_and_without
    whole = fedrot.merge(pairs, base=base).state_dict
    base_model(HEADS).save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert all(torch.equal(x, whole[key]) for key, x in fedrot.merge(pairs, base=tmp_path / "shards").state_dict.items())


def test_a_head_and_lora_on_it_are_not_merged():
    torch.manual_seed(0)
    config = {"r": 2, "peft_type": "LORA"}
    head = {"base_model.model.classifier.weight": torch.ones(3, 16), "base_model.model.classifier.bias": torch.ones(3)}
    lora = {
        "base_model.model.classifier.lora_A.weight": torch.ones(2, 16),
        "base_model.model.classifier.lora_B.weight": torch.ones(3, 2),
    }
    query = {"base_model.model.q.lora_A.weight": torch.ones(2, 16), "base_model.model.q.lora_B.weight": torch.ones(16, 2)}
    with refused("client 0", "client 1", "classifier.weight", "(3, 16)", "LoRA"):
        fedrot.merge([(query | head, config), (query | lora, config)], modules_to_save="first")


def test_unlike_bases_warn():
    pairs = [
        (u, c.to_dict() | {"base_model_name_or_path": name})
        for (u, c), name in zip(map(llama_update, (1, 2)), "ab", strict=True)
    ]
    with pytest.warns(UserWarning, match="base models a, b"):
        fedrot.merge(pairs)


@pytest.mark.parametrize(
    "options", [[], ["--weights", "1", "-2", "3"], ["--weights", "1", "-1", "1", "--normalize", "no"]], ids=" ".join
)
def test_a_preview_says_what_merges_lose(unlike, tmp_path, options, capsys):
    before = sorted(Path(tmp_path).rglob("*"))
    assert main(["merge", *map(str, unlike), "--dry-run", *options]) == 0
    assert sorted(Path(tmp_path).rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    methods, last = lines[1].split()[1:], lines[-1]
    assert methods == ["flexlora", "fedrot-least-error"]
    weights = [float(w) for w in options[1:4]] if options else None
    checked = 0
    for line in lines[2:-1]:
        name, errors = line[:24], line[24:].split()
        rank = None if "own" in name else int(name.split(",")[0])
        for method, error in zip(methods, errors, strict=True):
            if error != "–":
                result = fedrot.merge(unlike, weights, rank=rank, method=method, normalize="--normalize" not in options)
                assert float(error) == pytest.approx(result.report.relative_error, abs=6e-5)
                checked += 1
    assert checked >= 8
    tolerated = int(last.split("from rank ")[1].split(",")[0])
    errors = [
        fedrot.merge(unlike, weights, rank=rank, normalize="--normalize" not in options).report.relative_error
        for rank in (tolerated - 1, tolerated)
    ]
    assert errors[1] <= 0.05 < errors[0]


def test_a_merge_needs_a_folder_or_a_dry_run(unlike, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["merge", *map(str, unlike)])
    assert ended.value.code == 2 and "--output" in capsys.readouterr().err


def test_help_says_what_loses_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "flexlora loses nothing at the sum of their ranks" in text and "divided by their sum" in text


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


def test_merged_bert_still_loads_into_its_model(with_and_without, tmp_path):
    pairs, base = with_and_without
    fedrot.merge(pairs, base=base).save(tmp_path / "merged")
    model = PeftModel.from_pretrained(bert(), tmp_path / "merged")
    assert torch.equal(model.classifier.modules_to_save.default.weight, fedrot.read_adapter(tmp_path / "merged")[0][HEAD])


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


def test_the_base_of_a_tied_head_holds_one_of_the_two(tmp_path):
    torch.manual_seed(0)
    base = tied_llama()
    base.save_pretrained(tmp_path / "base")
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    config = {"r": 2, "target_modules": ["q_proj"]}
    saved, (first,) = clients(tied_llama, config | {"modules_to_save": ["lm_head"]}, 1, dtype=torch.float32)
    plain, (second,) = clients(tied_llama, config, 1, dtype=torch.float32)
    result = fedrot.merge([(first, saved), (second, plain)], [1, 3], base=tmp_path / "base")
    key = "base_model.model.lm_head.weight"
    torch.testing.assert_close(result.state_dict[key], (first[key] + 3 * base.lm_head.weight.detach()) / 4)


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


@pytest.mark.parametrize("policy", ["first", "drop"])
def test_heads_of_unlike_classes_need_no_mean(with_and_without, policy):
    (first, _), _ = with_and_without
    keys = [key for key in first[0] if "classifier" in key]
    other = {key: torch.ones(5, *x.shape[1:]) if key in keys else x for key, x in first[0].items()}
    with refused("client 1", "(5"):
        fedrot.merge([first, (other, first[1])])
    merged = fedrot.merge([first, (other, first[1])], modules_to_save=policy).state_dict
    assert all((key in merged) == (policy == "first") for key in keys)
