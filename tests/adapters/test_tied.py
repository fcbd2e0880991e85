"""Tied embeddings: an adapter that PEFT saves twice is rotated and counted once, and a base update is added once."""

import pytest
import torch
from peft import LoraConfig, PeftModel

import fedrot

from ..mixtures import TIED, adapted, base_weights, clients, deltas, t5, tied_llama
from ..refusals import refused

SHARES = [1 / 8, 2 / 8, 5 / 8]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]
every_model = pytest.mark.parametrize(("base", "config", "count"), TIED.values(), ids=TIED)
ALONE = {"r": 4, "lora_alpha": 4, "target_modules": ["lm_head"]}


def copies(state):
    """The pairs of tensors of which one repeats the other."""
    (A,) = (key for key in state if key.endswith(".lora_embedding_A"))
    (head,) = (key for key in state if key.endswith("lm_head.lora_A.weight"))
    return [(A, head.replace("lora_A", "lora_B")), (A.replace("_A", "_B"), head)]


def without_copy(state):
    return {key: x for key, x in state.items() if "embedding" not in key}


@every_model
@pytest.mark.parametrize(
    "method", [name for name in fedrot.METHODS if name not in ("flora", "ffa-lora", "fedsvd", "rolora")]
)
def test_both_copies_get_what_the_head_alone_would(base, config, count, method):
    lora, (reference, *updates) = clients(base, config, 4)
    result = fedrot.aggregate(updates, SHARES, reference, method=method, configs=lora)
    alone = fedrot.aggregate(
        [without_copy(u) for u in updates], SHARES, without_copy(reference), method=method, configs=lora
    )
    assert len(result.report.adapters) == count and result.report.error == alone.report.error
    assert all(torch.equal(result.state_dict[key], x) for key, x in alone.state_dict.items())
    if not result.personal:
        assert list(result.state_dict) == list(updates[0])
        assert all(torch.equal(result.state_dict[copy], result.state_dict[head].T) for copy, head in copies(updates[0]))


@every_model
def test_alignment_keeps_the_copies_and_their_update(base, config, count):
    _, (reference, update) = clients(base, config, 2)
    for align_on in ("A", "B", "joint"):
        aligned = fedrot.align(update, reference, strength=1.0, align_on=align_on)
        assert all(torch.equal(aligned[copy], aligned[head].T) for copy, head in copies(aligned))
        before, after = (deltas(adapted(base, config, state)) for state in (update, aligned))
        assert before.keys() == after.keys() and not torch.equal(
            aligned[copies(aligned)[0][1]], update[copies(aligned)[0][1]]
        )
        assert all(torch.allclose(after[name], x, rtol=1e-12, atol=1e-12) for name, x in before.items())


@every_model
@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_a_base_update_changes_the_shared_weight_once(base, config, count, method, tmp_path):
    lora, updates = clients(base, config, 3)
    result = fedrot.aggregate(updates, SHARES, updates[0], method=method, configs=lora)
    each = [deltas(adapted(base, config, u)) for u in updates]
    model, untouched = adapted(base, config, result.state_dict), base_weights(adapted(base, config))
    kept = deltas(model)
    fedrot.fold(model, result)
    for name, weight in base_weights(model).items():
        mean = sum(p * d[name] for p, d in zip(SHARES, each, strict=True))
        torch.testing.assert_close(weight - untouched[name] + kept[name], mean, rtol=1e-12, atol=1e-12)
    # So does PEFT with the saved base update, on the bare model.
    result.save(tmp_path / "saved")
    torch.manual_seed(0)
    bare = PeftModel.from_pretrained(base().double(), tmp_path / "saved" / "base_update", autocast_adapter_dtype=False)
    merged, folded = bare.merge_and_unload(), model.get_base_model()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(merged.get_input_embeddings().weight, folded.get_output_embeddings().base_layer.weight)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_an_update_of_one_end_is_refused_before_anything_changes(targets, method):
    config = ALONE | {"target_modules": targets}
    lora, updates = clients(tied_llama, config, 2)
    result = fedrot.aggregate(updates, reference=updates[0], method=method, configs=lora)
    model = adapted(tied_llama, config, result.state_dict)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with refused("lm_head", "embed_tokens", "(48, 16)", "ensure_weight_tying"):
        fedrot.fold(model, result)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], x) for name, x in before.items())
    assert set(model.peft_config) == {"default"}


def test_untied_ends_are_folded_as_ever():
    def untied():
        model = tied_llama()
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    lora, updates = clients(untied, ALONE, 2)
    result = fedrot.aggregate(updates, reference=updates[0], method="flora", configs=lora)
    model, plain = adapted(untied, ALONE, result.state_dict), adapted(untied, ALONE)
    fedrot.fold(model, result)
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    ((name, weight),) = base_weights(model).items()
    mean = sum(deltas(adapted(untied, ALONE, u))[name] for u in updates) / 2
    torch.testing.assert_close(weight - base_weights(plain)[name], mean, rtol=1e-12, atol=1e-12)


def test_a_saved_head_is_no_second_end():
    """The embedding that a saved head was once tied to may change: the model computes with the head's copy."""
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}
    lora, updates = clients(tied_llama, config, 2)
    result = fedrot.aggregate(updates, reference=updates[0], method="fedex-lora", configs=lora)
    fedrot.fold(adapted(tied_llama, config, result.state_dict), result)


def test_every_tied_end_of_t5_is_named():
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["lm_head"]}
    lora, updates = clients(t5, config, 2)
    result = fedrot.aggregate(updates, reference=updates[0], method="flora", configs=lora)
    with refused("lm_head", "one tensor with that of"):
        fedrot.fold(adapted(t5, config, result.state_dict), result)


def test_a_client_whose_copies_differ_is_refused():
    base, config, _ = TIED["Llama, head"]
    _, updates = clients(base, config, 2)
    (copy, head), _ = copies(updates[1])
    torn = updates[1] | {copy: updates[1][copy] + 1}
    with refused("client 1", copy, head, "(4, 48)"):
        fedrot.aggregate([updates[0], torn])
    with refused("the reference", copy):
        fedrot.aggregate(updates, reference=torn)
    stream = fedrot.FedRotAggregator(updates[0])
    stream.add(updates[0])
    with refused("client 1", copy):
        stream.add(torn)
    # Where no client's copies agree, they are two adapters.
    assert len(fedrot.aggregate([torn, torn]).report.adapters) == 2


@every_model
def test_streams_partial_aggregates_and_truncation_keep_the_copies(base, config, count, tmp_path):
    lora, (reference, *updates) = clients(base, config, 4)
    whole = fedrot.aggregate(updates, SHARES, reference)
    first, second = fedrot.FedRotAggregator(reference), fedrot.FedRotAggregator(reference)
    first.add(updates[0], SHARES[0])
    for i in (1, 2):
        second.add(updates[i], SHARES[i], f"client {i}")
    second.partial().save(tmp_path / "part.safetensors")
    first.merge(tmp_path / "part.safetensors")
    result = first.finish().state_dict
    for key, x in whole.state_dict.items():
        torch.testing.assert_close(result[key], x, rtol=1e-12, atol=1e-12)
    small = fedrot.truncate((whole.state_dict, lora), 2)
    assert all(torch.equal(small[copy], small[head].T) and small[copy].shape[0] == 2 for copy, head in copies(small)[:1])


@every_model
def test_merged_adapters_stay_tied(base, config, count, tmp_path):
    lora, updates = clients(base, config, 2)
    result = fedrot.merge([(u, lora) for u in updates], rank=12)
    result.save(tmp_path / "merged")
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(base().double(), tmp_path / "merged", autocast_adapter_dtype=False)
    each = [deltas(adapted(base, config, u)) for u in updates]
    for name, x in deltas(model).items():
        torch.testing.assert_close(x, (each[0][name] + each[1][name]) / 2, rtol=1e-10, atol=1e-10)
    assert len(result.report.adapters) == count


def test_an_adapter_that_ties_and_one_that_does_not_are_not_merged():
    tied, plain = (clients(tied_llama, ALONE | own, 1) for own in ({"ensure_weight_tying": True}, {}))
    with refused("client 1", "lm_head", "ensure_weight_tying"):
        fedrot.merge([(tied[1][0], tied[0]), (plain[1][0], plain[0])])


@pytest.mark.parametrize("model", [lambda: torch.nn.Linear(3, 3), tied_llama], ids=["a layer", "a base model"])
def test_only_a_peft_model_is_folded_into(model):
    lora, updates = clients(tied_llama, ALONE, 1)
    result = fedrot.aggregate(updates, method="flora", configs=lora)
    with refused("PeftModel", type(model()).__name__):
        fedrot.fold(model(), result)


def test_a_model_of_another_architecture_is_named():
    lora, updates = clients(tied_llama, {"r": 4, "target_modules": ["q_proj"]}, 1)
    result = fedrot.aggregate(updates, method="flora", configs=lora)
    other = adapted(t5, {"r": 4, "target_modules": ["q"]})
    with refused("self_attn.q_proj", "no such module"):
        fedrot.fold(other, result)


def test_ensure_weight_tying_without_a_tied_module_changes_nothing():
    lora, updates = clients(tied_llama, {"r": 4, "target_modules": ["q_proj"]}, 2)
    configs = LoraConfig(**lora.to_dict() | {"ensure_weight_tying": True, "peft_type": "LORA"})
    assert len(fedrot.aggregate(updates, configs=configs).report.adapters) == 1
