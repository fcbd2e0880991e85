"""Configurations by which the same factors mean other updates: refused wherever they are known, and only those."""

import json
from dataclasses import replace

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, get_peft_model_state_dict, initialize_lora_eva_weights

import fedrot
from fedrot.cli import main

from ..mixtures import tied_llama
from ..peft_models import KINDS, client_updates, llama, peft_model
from ..refusals import refused

KIND = KINDS["linear"]
# field → a value of the first adapter, and of the second; None for a field that is not there.
UNLIKE = {
    "trainable_token_indices": ([1, 5], [2, 7]),
    "init_lora_weights": ("pissa", None),
    "init_lora_weights ": ("olora", "pissa"),
    "init_lora_weights  ": (True, "corda"),
    "init_lora_weights   ": ("gaussian", "lora_ga"),
    "init_lora_weights    ": ("loftq", "eva"),
    "layer_replication": ([[0, 2], [1, 2]], [[0, 1], [0, 2]]),
    "alora_invocation_tokens": ([1, 2], None),
    "fan_in_fan_out": (True, None),
    "lora_bias": (True, False),
    "use_qalora": (True, False),
    "use_dora": (None, True),
    "lora_alpha": (8, 16),
    "lora_alpha ": (9, None),
    "use_rslora": (True, None),
    "alpha_pattern": ({"q_proj": 3}, {}),
}
# The same factors mean the same: missing fields are PEFT's defaults, and what does not touch ΔW does not count.
ALIKE = {
    "a field that is missing": ({"use_qalora": False, "qalora_group_size": 16}, {}),
    "defaults of the scaling": (
        {"lora_alpha": 8, "use_rslora": False, "rank_pattern": {}},
        {"lora_alpha": 8, "alpha_pattern": {}},
    ),
    "starts that leave the base as it is": ({"init_lora_weights": "eva"}, {"init_lora_weights": True}),
    "names of starts": ({"init_lora_weights": "OLoRA"}, {"init_lora_weights": "olora"}),
    "another spelling of one scaling": ({"lora_alpha": 8}, {"lora_alpha": 1, "alpha_pattern": {".*": 8}}),
    "rsLoRA of the same s": ({"lora_alpha": 8}, {"lora_alpha": 4, "use_rslora": True}),
    "a list of tokens and its mapping": ({"trainable_token_indices": [1]}, {"trainable_token_indices": {"wte": [1]}}),
    "training": ({"lora_dropout": 0.1, "base_model_name_or_path": "/a"}, {"inference_mode": True, "task_type": "CAUSAL_LM"}),
    "new fields of PEFT": ({"arrow_config": None, "ensure_weight_tying": False, "velora_config": None}, {}),
}


def pair(mine, theirs):
    known = {"peft_type": "LORA", "r": 4}
    updates = client_updates(KIND, 2)
    return [
        (update, known | {key.strip(): x for key, x in own.items() if x is not None})
        for update, own in zip(updates, (mine, theirs), strict=True)
    ]


@pytest.mark.parametrize(("field", "values"), UNLIKE.items())
@pytest.mark.parametrize("method", ["fedit", "flexlora", "fedrot"])
def test_unlike_meanings_are_refused_wherever_a_configuration_is_known(field, values, method, tmp_path, capsys):
    first, second = pair({field: values[0]}, {field: values[1]})
    field = field.strip()
    scaled = field in ("lora_alpha", "use_rslora", "alpha_pattern")
    if scaled and method != "fedit":  # these bring clients to one scaling
        fedrot.aggregate([first, second], method=method)
        return
    with refused("client 1", "client 0", field):
        fedrot.aggregate([first, second], method=method)
    if method == "flexlora":
        return
    with refused("the reference", "client 0", field):
        fedrot.aggregate([first], reference=second, method=method)
    reference = client_updates(KIND, 1, seed=9)[0]
    stream, other = (fedrot.FedRotAggregator(reference, method=method) for _ in range(2))
    stream.add(first)
    with refused("client 1", "client 0", field):
        stream.add(second)
    other.add(second, name="other")
    with refused("the partial aggregate", field):
        stream.merge(other.partial())
    other.add(second, name="other")
    other.partial().save(tmp_path / "part.safetensors")
    with refused("part.safetensors", field):
        stream.merge(tmp_path / "part.safetensors")
    assert stream.finish().report.clients == ("client 0",)
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, (update, config) in zip(folders, (first, second), strict=True):
        fedrot.write_adapter(folder, update, config)
    assert main(["aggregate", *map(str, folders), "--method", method, "--output", str(tmp_path / "out")]) == 1
    assert main(["inspect", *map(str, folders), "--strength", "0"]) == (0 if scaled else 1)
    printed = capsys.readouterr().err
    assert printed.count(field) >= (1 if scaled else 2) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("mine", "theirs"), ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("method", ["fedit", "fedrot", "flexlora"])
def test_configurations_that_mean_the_same_are_averaged(mine, theirs, method):
    first, second = pair(mine, theirs)
    result = fedrot.aggregate([first, second], method=method)
    bare = fedrot.aggregate([first[0], second[0]], method=method)
    assert all(torch.allclose(result.state_dict[key], x, atol=1e-6) for key, x in bare.state_dict.items())


def test_the_value_and_the_reason_are_named():
    first, second = pair({"trainable_token_indices": [1, 5]}, {"trainable_token_indices": {"wte": [2, 7]}})
    with refused("client 1 has trainable_token_indices = {'wte': [2, 7]}", "client 0 has [1, 5]", "other tokens"):
        fedrot.aggregate([first, second])


@pytest.mark.parametrize("start", ["pissa_niter_4", "PiSSA_niter_16"])
def test_a_base_that_is_drawn_anew_at_every_load_is_refused(start):
    first, second = pair({"init_lora_weights": start}, {"init_lora_weights": start})
    for do in (
        lambda: fedrot.aggregate([first, second]),
        lambda: fedrot.merge([first]),
        lambda: fedrot.FedRotAggregator(first),
    ):
        with refused("pissa_niter_", "path_initial_model_for_weight_conversion"):
            do()


def test_bases_that_depend_on_the_rank_are_not_averaged_over_ranks():
    wide = replace(KIND, config=KIND.config | {"r": 6})
    updates = [client_updates(kind, 1)[0] for kind in (KIND, wide)]
    configs = [{"peft_type": "LORA", "r": r, "init_lora_weights": "pissa"} for r in (4, 6)]
    with refused("client 1", "'pissa' at r = 6", "'pissa' at r = 4"):
        fedrot.aggregate(updates, method="flexlora", configs=configs)


def test_eva_leaves_the_base_as_it_is():
    """What the rule of starts rests on, in PEFT itself."""
    torch.manual_seed(0)
    model = llama()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    eva = get_peft_model(model, config)
    initialize_lora_eva_weights(eva, [{"input_ids": torch.arange(12)[None]}] * 8, show_progress_bar=False)
    after = {
        name.replace(".base_layer", ""): x for name, x in eva.get_base_model().state_dict().items() if "lora" not in name
    }
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_an_adapter_of_an_older_peft_goes_with_a_new_one(tmp_path):
    config = peft_model(KIND).peft_config["default"].to_dict()
    new = json.loads(json.dumps(config, default=lambda x: sorted(x) if isinstance(x, set) else str(x)))
    fields = (
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "bias",
        "fan_in_fan_out",
        "modules_to_save",
        "init_lora_weights",
    )
    old = {field: new[field] for field in fields}  # as PEFT before 0.17 wrote it, less what means nothing
    first, second = client_updates(KIND, 2)
    merged = fedrot.merge([(first, old), (second, new)], rank=8)
    again = fedrot.merge([(first, new), (second, new)], rank=8)
    assert all(torch.equal(merged.state_dict[key], x) for key, x in again.state_dict.items())
    fedrot.aggregate([(first, old), (second, new)])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_token_rows_of_real_adapters(tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, tokens in zip(folders, ([1, 5], [2, 7]), strict=True):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": tokens})
        model = get_peft_model(tied_llama(), config)
        model.save_pretrained(folder)
        assert any("trainable_tokens" in key for key in get_peft_model_state_dict(model))
    for method in ("fedit", "flexlora"):
        with refused("client 1", "trainable_token_indices", "[2, 7]", "[1, 5]"):
            fedrot.aggregate(folders, method=method)
    fedrot.aggregate([folders[0], folders[0]])
