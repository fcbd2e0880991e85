"""What merged adapters have of heads and other tensors that are no LoRA factors."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import fedrot

from ..mixtures import clients, tied_llama
from ..peft_models import KINDS, base_model, bert, client_updates, peft_model
from ..refusals import HEAD, refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized"),
]


NO_HEAD = {"modules_to_save": None}


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


def test_merged_bert_still_loads_into_its_model(with_and_without, tmp_path):
    pairs, base = with_and_without
    fedrot.merge(pairs, base=base).save(tmp_path / "merged")
    model = PeftModel.from_pretrained(bert(), tmp_path / "merged")
    assert torch.equal(model.classifier.modules_to_save.default.weight, fedrot.read_adapter(tmp_path / "merged")[0][HEAD])


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


@pytest.mark.parametrize("policy", ["first", "drop"])
def test_heads_of_unlike_classes_need_no_mean(with_and_without, policy):
    (first, _), _ = with_and_without
    keys = [key for key in first[0] if "classifier" in key]
    other = {key: torch.ones(5, *x.shape[1:]) if key in keys else x for key, x in first[0].items()}
    with refused("client 1", "(5"):
        fedrot.merge([first, (other, first[1])])
    merged = fedrot.merge([first, (other, first[1])], modules_to_save=policy).state_dict
    assert all((key in merged) == (policy == "first") for key in keys)
