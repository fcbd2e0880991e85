"""What a result writes: folders that PEFT loads, with options and report, whole or not at all."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

import fedrot

from ..definitions import assert_same_bits
from ..dense import KIND, SHARES, WEIGHTS, dense, lora_config, mean_update
from ..peft_models import base_model, bert, client_updates, factor_keys, save_clients
from ..refusals import CONFIG_FILE, WEIGHTS_FILE, A, refused

FILES = sorted([CONFIG_FILE, WEIGHTS_FILE, "aggregation.json"])


@pytest.fixture
def paths(tmp_path):
    return save_clients(KIND, tmp_path / "clients", 3)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def loaded(folder, base=None):
    return PeftModel.from_pretrained(base or base_model(KIND), str(folder), autocast_adapter_dtype=False)


def assert_same(first, second):
    assert_same_bits(dict(sorted(first.items())), dict(sorted(second.items())))


@pytest.mark.parametrize(
    "method", [name for name, m in fedrot.METHODS.items() if not m.updates_base and name != "fedsa-lora"]
)
def test_peft_loads_the_folder_of_a_plain_result(paths, tmp_path, method):
    if frozen := {"ffa-lora": A, "fedsvd": A, "rolora": A}.get(method):
        paths = [paths[0]] * 3
        assert frozen in fedrot.read_adapter(paths[0])[0]
    result = fedrot.aggregate(paths, WEIGHTS.tolist(), method=method)
    result.save(tmp_path / "new" / "merged")
    assert names(tmp_path / "new") == ["merged"] and names(tmp_path / "new/merged") == FILES
    assert_same(get_peft_model_state_dict(loaded(tmp_path / "new/merged")), result.state_dict)
    assert fedrot.read_adapter(tmp_path / "new/merged")[1] == result.config


def test_the_record_holds_options_and_report(paths, tmp_path):
    options = {"method": "fedrot", "align_on": "A", "strength": 0.25, "seed": 7, "on_invalid": "drop"}
    broken = {key: x * torch.nan for key, x in fedrot.read_adapter(paths[1])[0].items()}
    clients = [paths[0], (broken, lora_config(KIND)), str(paths[2])]
    result = fedrot.aggregate(clients, WEIGHTS.tolist(), round=3, **options)
    result.save(str(tmp_path / "merged"), record={"folders": ["a", "b"], "weights": None})
    record = json.loads((tmp_path / "merged/aggregation.json").read_text("utf-8"))
    chosen = record.pop("options")
    assert chosen == fedrot.AggregationOptions(**options).as_dict() | {"folders": ["a", "b"], "weights": None}
    assert record == json.loads(json.dumps(result.report.as_dict()))
    assert (record["method"], record["round"], list(record["dropped"])) == ("fedrot", 3, ["client 1"])
    assert len(record["adapters"]) == len(factor_keys(result.state_dict)) and record["error"] == result.report.error


def test_a_record_is_json_without_infinities(paths, tmp_path):
    result = fedrot.aggregate(paths)
    report = replace(result.report, adapters=tuple(replace(a, update_norm=0.0) for a in result.report.adapters))
    replace(result, report=report).save(tmp_path / "merged")
    text = (tmp_path / "merged/aggregation.json").read_text("utf-8")

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse)["relative_error"] is None


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_a_result_that_changes_the_base_is_two_adapters(paths, tmp_path, method):
    result = fedrot.aggregate(paths, WEIGHTS.tolist(), method=method)
    result.save(tmp_path / "merged")
    assert names(tmp_path / "merged") == ["adapter", "base_update"]
    assert names(tmp_path / "merged/adapter") == FILES
    assert names(tmp_path / "merged/base_update") == [name for name in FILES if name != "aggregation.json"]
    base = loaded(tmp_path / "merged/base_update").merge_and_unload()
    model = loaded(tmp_path / "merged/adapter", base)
    before = dict(base_model(KIND).named_modules())
    expected = mean_update([KIND] * 3, [fedrot.read_adapter(path)[0] for path in paths], SHARES)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        weight = layer.base_layer.weight + layer.get_delta_weight("default")
        change = weight - before[name.removeprefix("base_model.model.")].weight
        torch.testing.assert_close(change.detach(), expected[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_a_base_update_loads_into_a_classifier(tmp_path, method):
    """By the adapter's task type PEFT would look for a classifier in the base update, which has none."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    plain, folders = bert(), [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        get_peft_model(deepcopy(plain), config).save_pretrained(folder)
    fedrot.aggregate(folders, method=method).save(tmp_path / "merged")
    base = PeftModel.from_pretrained(deepcopy(plain), tmp_path / "merged/base_update").merge_and_unload()
    assert torch.equal(base.classifier.weight, plain.classifier.weight)

    name = "bert.encoder.layer.0.attention.self.query"
    merged, *clients = (
        PeftModel.from_pretrained(deepcopy(model), folder).get_submodule(f"base_model.model.{name}")
        for model, folder in [(base, tmp_path / "merged/adapter"), *((plain, folder) for folder in folders)]
    )
    change = merged.base_layer.weight + merged.get_delta_weight("default") - plain.get_submodule(name).weight
    torch.testing.assert_close(change, sum(client.get_delta_weight("default") for client in clients) / 2)


def test_clients_that_keep_a_factor_have_a_folder_each(paths, tmp_path):
    result = fedrot.aggregate(paths, WEIGHTS.tolist(), method="fedsa-lora")
    before = names(tmp_path)
    with refused("every client keeps its own", result.personal[0], "updates="):
        result.save(tmp_path / "merged")
    assert names(tmp_path) == before
    result.save(tmp_path / "merged", updates=paths)
    assert names(tmp_path / "merged") == ["client0", "client1", "client2"]
    for number, path in enumerate(paths):
        own, _ = fedrot.read_adapter(path)
        folder = tmp_path / "merged" / f"client{number}"
        assert names(folder) == FILES
        assert_same(get_peft_model_state_dict(loaded(folder)), {**own, **result.state_dict})
        assert dense(KIND, fedrot.read_adapter(folder)[0]).keys() == dense(KIND, own).keys()


def test_state_dicts_are_saved_with_the_configuration_given(tmp_path):
    updates = client_updates(KIND, 2)
    result = fedrot.aggregate(updates, method="fedsa-lora", configs=lora_config(KIND))
    result.save(tmp_path / "merged", updates=updates)
    assert [fedrot.read_adapter(tmp_path / "merged" / f"client{i}")[1] for i in range(2)] == [result.config] * 2


@pytest.mark.parametrize("given", [None, ["Oslo", "Rome", "Kyiv"]])
def test_dropped_clients_have_no_folder(tmp_path, given):
    updates = client_updates(KIND, 3)
    updates[1] = {key: x * torch.nan for key, x in updates[1].items()}
    server = fedrot.FedRotAggregator(method="fedsa-lora", on_invalid="drop", configs=lora_config(KIND))
    result = server.aggregate(updates, names=given)
    result.save(tmp_path / "merged", updates=updates, **({"names": given} if given else {}))
    assert names(tmp_path / "merged") == ["client0", "client2"]
    for wrong in (updates[:2], [*updates, updates[0]]):
        with refused("updates"):
            result.save(tmp_path / "another", updates=wrong, **({"names": given[: len(wrong)]} if given else {}))
    assert names(tmp_path) == ["merged"]


@pytest.mark.parametrize("method", ["fedrot", "fedsa-lora", "flexlora"])
def test_without_a_configuration_nothing_is_written(tmp_path, method):
    updates = client_updates(KIND, 2)
    with refused("without a LoRA configuration", "configs="):
        fedrot.aggregate(updates, method=method).save(tmp_path / "merged", updates=updates)
    assert not names(tmp_path)


@pytest.mark.parametrize("method", ["fedrot", "flora", "fedsa-lora"])
@pytest.mark.parametrize("existing", ["file", "folder", "dangling link"])
def test_nothing_is_overwritten(tmp_path, existing, method):
    updates, path = client_updates(KIND, 2), tmp_path / "merged"
    {"file": path.touch, "folder": path.mkdir, "dangling link": lambda: path.symlink_to("nowhere")}[existing]()
    with pytest.raises(FileExistsError, match=r"merged exists; choose another output folder"):
        fedrot.aggregate(updates, method=method, configs=lora_config(KIND)).save(path, updates=updates)
    assert names(tmp_path) == ["merged"]
    assert path.is_symlink() or path.is_file() or not names(path)


@pytest.mark.parametrize("method", ["fedrot", "flora", "fedsa-lora"])
def test_a_folder_is_whole_or_not_there(tmp_path, method):
    updates = client_updates(KIND, 2)
    result = fedrot.aggregate(updates, method=method, configs=lora_config(KIND))
    with pytest.raises(TypeError, match="not JSON serializable"):  # the tensors are written by then
        result.save(tmp_path / "merged", updates=updates, record={"folders": {"a set"}})
    assert not names(tmp_path)
    if method == "flora":
        with pytest.raises(ValueError, match="config must be"):  # and the first of the two folders
            replace(result, base_config=None).save(tmp_path / "merged")
        assert not names(tmp_path)
