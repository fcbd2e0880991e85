"""PEFT folders in and out: what save_pretrained wrote is aggregated, written, and loaded by PEFT again."""

import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

import fedrot

from ..peft_models import KINDS, base_model, client_updates, factor_keys, in_model, peft_model, save_clients

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
]
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def assert_same(first, second):
    assert first and first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]), key


def scaling(config, module):
    """s of an adapter, from the configuration as it was written."""
    name = module.rsplit(".", 1)[-1]
    rank = config["rank_pattern"].get(name, config["r"])
    return config["alpha_pattern"].get(name, config["lora_alpha"]) / (math.sqrt(rank) if config["use_rslora"] else rank)


@every_kind
def test_peft_loads_what_was_aggregated_from_folders(kind, tmp_path):
    paths = save_clients(kind, tmp_path / "clients", 3)
    result = fedrot.aggregate([str(paths[0]), *paths[1:]], [1, 2, 3], paths[1])
    clients = [fedrot.read_adapter(path)[0] for path in paths]
    assert_same(result.state_dict, fedrot.aggregate(clients, [1, 2, 3], clients[1]).state_dict)

    merged = tmp_path / "merged"
    fedrot.write_adapter(str(merged), result.state_dict, result.config)
    assert sorted(path.name for path in merged.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    written, given = (json.loads((path / "adapter_config.json").read_text("utf-8")) for path in (merged, paths[1]))
    assert written == given
    loaded = PeftModel.from_pretrained(base_model(kind), merged, autocast_adapter_dtype=False)
    assert_same(get_peft_model_state_dict(loaded), result.state_dict)

    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, LoraLayer)}
    for key_A, key_B in factor_keys(result.state_dict):
        name = key_A[: key_A.index(".lora_")]
        A, B = (result.state_dict[key].double().flatten(1) for key in (key_A, key_B))
        expected = scaling(written, name) * B @ A
        used = layers.pop(name).get_delta_weight("default").detach().double()
        used = used.T if written["fan_in_fan_out"] or "embedding" in key_A else used.flatten(1)
        eps = 8 * torch.finfo(kind.dtype).eps
        assert (used - expected).norm() <= eps * scaling(written, name) * A.norm() * B.norm(), name
    assert not layers


@every_kind
def test_peft_sets_every_trained_tensor_from_an_aggregate(kind):
    result, model = fedrot.aggregate(client_updates(kind, 2)), peft_model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(math.nan)
    loaded = set_peft_model_state_dict(model, result.state_dict)
    assert not loaded.unexpected_keys
    assert not any(name in loaded.missing_keys for name, p in model.named_parameters() if p.requires_grad)
    assert all(p.isfinite().all() for p in model.parameters())


@every_kind
def test_an_adapter_is_read_as_it_was_saved(kind, tmp_path):
    (update,) = client_updates(kind, 1)
    (path,) = save_clients(kind, tmp_path, 1)
    for form in (path, str(path)):
        state_dict, config = fedrot.read_adapter(form)
        assert_same(state_dict, update)
        assert config == json.loads((path / "adapter_config.json").read_text("utf-8"))
    aligned = fedrot.align(path, str(path), strength=1)
    assert [(key, x.shape, x.dtype) for key, x in aligned.items()] == [(k, x.shape, x.dtype) for k, x in state_dict.items()]


def test_the_configuration_is_the_references_or_else_the_first_updates(tmp_path):
    kind = KINDS["linear"]
    *paths, reference = save_clients(kind, tmp_path, 3)
    for path, name in zip((*paths, reference), ("first", "second", "the reference"), strict=True):
        config = json.loads((path / "adapter_config.json").read_text("utf-8"))
        (path / "adapter_config.json").write_text(json.dumps(config | {"revision": name}), "utf-8")
    in_memory = fedrot.read_adapter(reference)[0]
    assert fedrot.aggregate(paths, reference=reference).config["revision"] == "the reference"
    assert fedrot.aggregate([in_memory], reference=reference).config["revision"] == "the reference"
    assert fedrot.aggregate(paths, reference=in_memory).config["revision"] == "first"
    assert fedrot.aggregate([in_memory, paths[1]], reference=in_memory).config is None
    assert fedrot.aggregate(client_updates(kind, 2)).config is None


def test_the_configuration_stays_from_round_to_round(tmp_path):
    kind = KINDS["linear"]
    (reference,) = save_clients(kind, tmp_path, 1)
    aggregator = fedrot.FedRotAggregator(reference)
    for _ in range(2):
        assert aggregator.aggregate(client_updates(kind, 2)).config == fedrot.read_adapter(reference)[1]


@pytest.mark.parametrize("existing", ["file", "folder", "dangling link"])
def test_nothing_is_overwritten(existing, tmp_path):
    path = tmp_path / "merged"
    {"file": path.touch, "folder": path.mkdir, "dangling link": lambda: path.symlink_to("nowhere")}[existing]()
    with pytest.raises(FileExistsError, match=r"merged exists; choose another output folder"):
        fedrot.write_adapter(path, client_updates(KINDS["linear"], 1)[0], {"peft_type": "LORA"})
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert path.is_symlink() or path.is_file() or not list(path.iterdir())


LORA = {"peft_type": "LORA"}
# What is written, and the error.
CANNOT_BE_WRITTEN = {
    "configuration that is not JSON": (
        lambda update: (update, LORA | {"bias": {"none"}}),
        TypeError,
        "not JSON serializable",
    ),
    "no configuration": (lambda update: (update, None), ValueError, "config must be"),
    "empty configuration": (lambda update: (update, {}), ValueError, "config must be"),
    "tensor without data": (lambda u: ({k: x.to("meta") for k, x in u.items()}, LORA), fedrot.UpdateError, "with data"),
    "two adapters": (lambda u: (in_model(KINDS["linear"], u) | u, LORA), fedrot.UpdateError, "two adapters"),
}


@pytest.mark.parametrize(("break_it", "error", "message"), CANNOT_BE_WRITTEN.values(), ids=CANNOT_BE_WRITTEN)
def test_what_peft_could_not_load_is_not_written_at_all(break_it, error, message, tmp_path):
    update, config = break_it(client_updates(KINDS["linear"], 1)[0])
    with pytest.raises(error, match=message):
        fedrot.write_adapter(tmp_path / "merged", update, config)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_written_with_the_usual_permissions_and_missing_parents(tmp_path):
    (update,) = client_updates(KINDS["linear"], 1)
    strided = {key: torch.nn.Parameter(x.T.contiguous().T) for key, x in update.items()}
    fedrot.write_adapter(tmp_path / "new" / "merged", strided, {"peft_type": "LORA", "r": 4})
    assert_same(fedrot.read_adapter(tmp_path / "new/merged")[0], update)
    usual = tmp_path / "usual"
    usual.mkdir()
    assert (tmp_path / "new/merged").stat().st_mode == usual.stat().st_mode
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]
