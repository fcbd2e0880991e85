"""Adapters trained independently, merged into one that PEFT loads: against Σ wᵢsᵢBᵢAᵢ in dense float64 arithmetic."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import BertConfig, BertForSequenceClassification

import fedrot
from fedrot.cli.commands import main

from ..dense import KIND, SHARES
from ..peft_models import KINDS, Kind, base_model, client_updates, factor_keys, peft_model, save_folder, turned_clients
from ..refusals import HEAD, refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
]
UNLIKE = [
    {"r": 2, "lora_alpha": 8},
    {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["query", "key"]},
    {
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": {"value": 5},
        "alpha_pattern": {"value": 7},
        "target_modules": ["value", "dense"],
    },
]


ROTATED = ["--method", "fedrot-least-error"]
COMMANDS = [[], ROTATED, [*ROTATED, "--reflections"], [*ROTATED, "--rank", "9", "--alpha", "4"], ["--rank", "4"]]
every_method = pytest.mark.parametrize("method", ["flexlora", "fedrot-least-error"])


@pytest.fixture
def unlike(tmp_path):
    """Folders of one base whose ranks, scalings and modules all differ."""
    kinds = [replace(KIND, config=KIND.config | own) for own in UNLIKE]
    return [save_folder(kind, client_updates(kind, 1, seed)[0], tmp_path / f"own{seed}") for seed, kind in enumerate(kinds)]


def loaded(path, kind=KIND):
    return PeftModel.from_pretrained(base_model(kind), path, autocast_adapter_dtype=False).eval()


def deltas(path, kind=KIND):
    """module → s·B·A, as PEFT computes it from a folder."""
    layers = {name: m for name, m in loaded(path, kind).named_modules() if isinstance(m, LoraLayer)}
    return {name: m.get_delta_weight("default").detach().double() for name, m in layers.items()}


def mean_delta(paths, shares=SHARES, kind=KIND):
    total = {}
    for share, path in zip(shares, paths, strict=True):
        for name, delta in deltas(path, kind).items():
            total[name] = total.get(name, 0) + share * delta
    return total


def best(M, k):
    U, S, Vh = torch.linalg.svd(M)
    return U[:, :k] * S[:k] @ Vh[:k]


@pytest.mark.parametrize("options", COMMANDS, ids=" ".join)
def test_peft_loads_what_was_merged_and_computes_with_it(unlike, tmp_path, options, capsys):
    output = tmp_path / "out" / "merged"
    command = ["merge", *map(str, unlike), "--weights", "1", "2", "5", "--output", str(output), *options]
    assert main(command) == 0
    printed = capsys.readouterr()
    record, config = (json.loads((output / f"{n}.json").read_text()) for n in ("aggregation", "adapter_config"))
    assert record["options"]["weights"] == [1, 2, 5] and str(output) in printed.out and not printed.err
    mean, merged = mean_delta(unlike), deltas(output)
    assert mean.keys() == merged.keys()
    # The model computes what the base does with these changes of its weights.
    x, changed = {"input_ids": torch.arange(12)[None]}, base_model(KIND).eval()
    saved, _ = fedrot.read_adapter(output)
    heads = {key.removeprefix("base_model.model."): x for key, x in saved.items() if "lora" not in key}
    assert heads and not changed.load_state_dict(heads, strict=False).unexpected_keys
    for name, delta in merged.items():
        changed.get_submodule(name.removeprefix("base_model.model.")).weight.data += delta
    torch.testing.assert_close(loaded(output)(**x).logits, changed(**x).logits, rtol=1e-9, atol=1e-10)
    squares = torch.zeros(2, dtype=torch.float64)
    for report in record["adapters"]:
        error, norm = (mean[report["module"]] - merged[report["module"]]).norm(), mean[report["module"]].norm()
        # By Gram matrices an error of zero is one of half the digits.
        assert report["error"] == pytest.approx(float(error), rel=1e-6, abs=1e-7 * float(norm))
        assert report["update_norm"] == pytest.approx(float(norm), rel=1e-6)
        squares += torch.stack([error, norm]).square()
        if "--method" not in options and "--rank" not in options:
            lowest = mean[report["module"]] - best(mean[report["module"]], report["rank"])
            assert float(error) == pytest.approx(float(lowest.norm()), rel=1e-9, abs=1e-9)
    plain = plain_average(mean, unlike)
    assert (squares[0] / squares[1]).sqrt() < plain
    assert record["method"] == ("fedrot-least-error" if "--method" in options else "flexlora")
    if "--rank" in options:
        assert config["r"] == int(options[options.index("--rank") + 1]) and not config["rank_pattern"]
        assert ("--alpha" in options) == (config["lora_alpha"] == 4 and not config["alpha_pattern"])


def plain_average(mean, paths):
    """The relative error of averaging the factors as they are, √s on both, rows of zero where ranks differ."""
    squares, models = torch.zeros(2, dtype=torch.float64), [dict(loaded(path).named_modules()) for path in paths]
    for name, M in mean.items():
        A, B = torch.zeros(9, M.shape[1], dtype=M.dtype), torch.zeros(M.shape[0], 9, dtype=M.dtype)
        for share, layers in zip(SHARES, models, strict=True):
            if isinstance(layer := layers[name], LoraLayer):
                r, root = layer.r["default"], layer.scaling["default"] ** 0.5
                A[:r] += share * root * layer.lora_A.default.weight.detach()
                B[:, :r] += share * root * layer.lora_B.default.weight.detach()
        squares += torch.stack([(M - B @ A).norm(), M.norm()]).square()
    return (squares[0] / squares[1]).sqrt()


def two_layers():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes))


APART = {
    "names": ({"target_modules": ["query"]}, {"target_modules": ["value"]}, ["query", "value"]),
    "layers": (
        {"target_modules": ["query"], "layers_to_transform": [0]},
        {"target_modules": ["query", "key"], "layers_to_transform": [1]},
        r"bert\.encoder\.layer\.0\.attention\.self\.query|bert\.encoder\.layer\.1\.attention\.self\.key"
        r"|bert\.encoder\.layer\.1\.attention\.self\.query",
    ),
}


@every_method
@pytest.mark.parametrize(("first", "second", "both"), APART.values(), ids=APART)
def test_a_module_that_one_adapter_lacks_loses_nothing(tmp_path, first, second, both, method):
    kinds = [Kind(two_layers, config, torch.float64) for config in (first, second)]
    folders = [save_folder(k, client_updates(k, 1, i)[0], tmp_path / str(i)) for i, k in enumerate(kinds)]
    result = fedrot.merge(folders, [1, 3], method=method)
    fedrot.write_adapter(tmp_path / "merged", result.state_dict, result.config)
    mean, merged = mean_delta(folders, [0.25, 0.75], kinds[0]), deltas(tmp_path / "merged", kinds[0])
    assert merged.keys() == mean.keys()
    for name, delta in merged.items():
        torch.testing.assert_close(delta, mean[name], rtol=1e-9, atol=1e-10)
    assert result.report.relative_error < 1e-7
    assert result.config["target_modules"] == both and result.config["rank_pattern"] == {}
    assert (result.config["r"], result.config["lora_alpha"]) == (4, 8)


@every_method
@pytest.mark.parametrize("own", [{}, {"layers_to_transform": [0]}, {"target_modules": ".*(query|value)"}])
def test_one_update_in_many_bases_comes_back_as_itself(own, method, tmp_path):
    kind = replace(KIND, config=KIND.config | own)
    _, clients = turned_clients(kind, 3, noise=0)
    folders = [save_folder(kind, client, tmp_path / str(i)) for i, client in enumerate(clients)]
    result = fedrot.merge(folders, method=method)
    fedrot.write_adapter(tmp_path / "merged", result.state_dict, result.config)
    before, merged = deltas(folders[0]), deltas(tmp_path / "merged")
    assert before.keys() == merged.keys()
    for name, delta in merged.items():
        torch.testing.assert_close(delta, before[name], rtol=1e-6, atol=1e-6 * float(before[name].norm()))
    assert len(set(result.report.adapters[0].angles)) == (1 if method == "flexlora" else 3)  # which rotates none


def test_a_single_adapter_changes_its_rank_and_alpha_only(unlike, tmp_path):
    before = deltas(unlike[2])
    for number, (options, config) in enumerate(
        {
            (): {"r": 3, "lora_alpha": 5},
            (("rank", 8),): {"r": 8, "rank_pattern": {}},
            (("rank", 2),): {"r": 2, "rank_pattern": {}},
            (("rank", 2), ("alpha", 10)): {"r": 2, "lora_alpha": 10, "alpha_pattern": {}},
            (("alpha", 10),): {"lora_alpha": 10, "alpha_pattern": {}},
        }.items()
    ):
        result = fedrot.merge(unlike[2:], **dict(options))
        assert config.items() <= result.config.items()
        fedrot.write_adapter(tmp_path / f"merged{number}", result.state_dict, result.config)
        for name, delta in deltas(tmp_path / f"merged{number}").items():
            expected = best(before[name], 2) if config["r" if "r" in config else "lora_alpha"] == 2 else before[name]
            torch.testing.assert_close(delta, expected, rtol=1e-9, atol=1e-10)


@every_method
@pytest.mark.parametrize("name", [name for name in KINDS if "DoRA" not in name and name != "trainable tokens"])
def test_every_kind_is_merged_and_loaded(name, method, tmp_path):
    kinds = [
        replace(KINDS[name], config=KINDS[name].config | own)
        for own in ({"r": 2, "lora_alpha": 8}, {"r": 4, "lora_alpha": 3})
    ]
    updates = [client_updates(kind, 1, seed)[0] for seed, kind in enumerate(kinds)]
    if name == "embedding, saved with its base":
        updates[1] = {**updates[1], **{k: x for k, x in updates[0].items() if k.endswith("base_layer.weight")}}
    folders = [save_folder(kind, u, tmp_path / str(i)) for i, (kind, u) in enumerate(zip(kinds, updates, strict=True))]
    result = fedrot.merge(folders, [1, 2], method=method, reflections=True)
    fedrot.write_adapter(tmp_path / "merged", result.state_dict, result.config)
    s = [{n: m.scaling["default"] for n, m in peft_model(k).named_modules() if isinstance(m, LoraLayer)} for k in kinds]
    final = loaded(tmp_path / "merged", KINDS[name])
    layers = {n: m for n, m in final.named_modules() if isinstance(m, LoraLayer)}
    dtype = KINDS[name].dtype
    for keys, report in zip(factor_keys(result.state_dict), result.report.adapters, strict=True):
        module = keys[0].split(".lora_")[0]
        pairs = [[u[key].double().flatten(1) for key in keys] for u in updates]
        mean = sum(p * of[module] * B @ A for p, of, (A, B) in zip((1 / 3, 2 / 3), s, pairs, strict=True))
        A, B = (result.state_dict[key].double().flatten(1) for key in keys)
        used = layers[module].scaling["default"] * B @ A
        scale = layers[module].scaling["default"] * float(A.norm() * B.norm())
        slack = 4 * torch.finfo(dtype).eps * scale + 1e-6 * float(mean.norm())
        assert float((mean - used).norm()) == pytest.approx(report.error, abs=slack)
        bias = f"{module}.lora_B.bias"
        if bias in updates[0]:
            expected = sum(p * of[module] * u[bias] for p, of, u in zip((1 / 3, 2 / 3), s, updates, strict=True))
            torch.testing.assert_close(layers[module].scaling["default"] * result.state_dict[bias], expected)
    assert {x.dtype for x in result.state_dict.values()} == {dtype}
    for key in result.state_dict.keys() - {key for keys in factor_keys(updates[0]) for key in keys}:
        if "lora" not in key:
            mean = updates[0][key].double() / 3 + updates[1][key].double() * 2 / 3
            tolerance = {"rtol": torch.finfo(dtype).eps, "atol": float(mean.abs().max()) * torch.finfo(dtype).eps}
            torch.testing.assert_close(result.state_dict[key].double(), mean, **tolerance)


def test_adapters_of_two_dtypes_are_merged_in_the_wider():
    kinds = [KINDS["bfloat16"], KINDS["modules to save"]]
    adapters = [(client_updates(k, 1, i)[0], peft_model(k).peft_config["default"]) for i, k in enumerate(kinds)]
    assert {x.dtype for x in fedrot.merge(adapters).state_dict.values()} == {torch.float32}


def with_(folder, **changed):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changed))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: with_(f, use_dora=True), ["DoRA"]),
        (lambda f: with_(f, init_lora_weights="pissa_niter_4"), ["pissa_niter_4", "base weights"]),
        (lambda f: with_(f, init_lora_weights="pissa"), ["pissa", "changes the base"]),
        (lambda f: with_(f, lora_bias=True), ["lora_bias = True", "False"]),
        (lambda f: with_(f, fan_in_fan_out=True), ["fan_in_fan_out"]),
        (lambda f: with_(f, r=5), ["rank 5", "(6, 16)"]),
        (lambda f: with_(f, lora_alpha=0), ["lora_alpha is 0"]),
    ],
)
def test_what_is_no_plain_update_is_refused_by_the_command(unlike, tmp_path, capsys, spoil, named):
    before = sorted(tmp_path.iterdir())
    spoil(unlike[1])
    assert main(["merge", *map(str, unlike), "--output", str(tmp_path / "merged")]) == 1
    printed = capsys.readouterr().err
    assert "client 1" in printed and str(unlike[1]) in printed and printed.count("\n") == 1
    assert all(part in printed for part in named), printed
    assert sorted(tmp_path.iterdir()) == before


def test_adapters_that_do_not_fit_are_refused():
    kind = KINDS["modules to save"]
    config, (first, second) = peft_model(kind).peft_config["default"], client_updates(kind, 2)
    without = {key: x for key, x in second.items() if key != HEAD}
    with refused("client 1", "lacks", HEAD, "(3, 16)", "--base", "first"):
        fedrot.merge([(first, config), (without, config)])
    key = factor_keys(first)[0][0]
    with refused("client 1", key, "(4, 9)", "(4, 16)", "one base model"):
        fedrot.merge([(first, config), ({**second, key: torch.ones(4, 9)}, config)])
    with refused("client 1", "no LoRA configuration"):
        fedrot.merge([(first, config), second])
    with refused("client 1", key, "NaN"):
        fedrot.merge([(first, config), ({**second, key: first[key] * torch.nan}, config)])
    with refused("2 weights"):
        fedrot.merge([(first, config)], [1, 1])
    for options in ({"rank": 0}, {"rank": 2.0}, {"alpha": 0}, {"reflections": "O"}, {"method": "svd"}, {"method": "fedit"}):
        with refused(next(iter(options)), error=ValueError):
            fedrot.merge([(first, config)], **options)


def test_other_names_of_the_base_are_a_note(unlike, tmp_path, capsys):
    with_(unlike[1], base_model_name_or_path="/elsewhere/bert")
    assert main(["merge", *map(str, unlike), "--output", str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr().err
    assert printed.startswith("note:") and "/elsewhere/bert" in printed and printed.count("\n") == 1


def test_base_weights_saved_with_an_embedding_must_agree(tmp_path):
    kind = KINDS["embedding, saved with its base"]
    updates = client_updates(kind, 2)
    config = peft_model(kind).peft_config["default"]
    (key,) = (key for key in updates[0] if key.endswith("base_layer.weight"))
    only = {k: x for k, x in updates[1].items() if "embed_tokens" not in k}
    narrow = {**config.to_dict(), "target_modules": ["q_proj"]}
    merged = fedrot.merge([(updates[0], config), (only, narrow)]).state_dict  # the second has no embedding at all
    assert torch.equal(merged[key], updates[0][key])
    with refused("client 1", key, "base weights differ"):
        fedrot.merge([(updates[0], config), ({**updates[1], key: updates[1][key] + 1}, config)])


def test_flexlora_of_a_rank_that_holds_all_is_exact(unlike, tmp_path):
    result = fedrot.merge(unlike, [1, 2, 5], rank=13)
    fedrot.write_adapter(tmp_path / "merged", result.state_dict, result.config)
    mean = mean_delta(unlike)
    for name, delta in deltas(tmp_path / "merged").items():
        torch.testing.assert_close(delta, mean[name], rtol=1e-9, atol=1e-9)
    assert result.report.method == "flexlora" and result.report.relative_error < 1e-6
