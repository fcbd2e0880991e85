"""Folders that save_pretrained wrote in other shapes: in shards with an index, and with an adapter's name below."""

import json
import os

import peft
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

import fedrot

from ..peft_models import KINDS, base_model, save_clients
from ..refusals import CONFIG_FILE, LINEAR, WEIGHTS_FILE, refused

# What model.save_pretrained(folder, max_shard_size=…) of Transformers writes for a model with model.add_adapter(…).
INDEX = "model.safetensors.index.json"


def save_in_shards(folder, size=500):
    """Split a folder's file as Transformers does; return the names of the shards."""
    tensors = load_file(folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).unlink()
    pattern = WEIGHTS_FILE.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=size)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
    return sorted(split.filename_to_tensors)


def assert_same(first, second):
    assert first and first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("index", [INDEX, "adapter_model.safetensors.index.json"])
@pytest.mark.parametrize("size", [1, 500])
def test_shards_are_read_as_one_file(folders, size, index):
    whole = fedrot.aggregate(folders, reference=folders[1])
    names = save_in_shards(folders[0], size)
    (folders[0] / INDEX).rename(folders[0] / index)
    assert len(names) > 2
    assert_same(fedrot.aggregate(folders, reference=folders[1]).state_dict, whole.state_dict)


def edit(change):
    """Change the index's map of keys to files."""

    def apply(folder, names):
        index = json.loads((folder / INDEX).read_text("utf-8"))
        change(index["weight_map"], names)
        (folder / INDEX).write_text(json.dumps(index), "utf-8")

    return apply


def put(text):
    return lambda folder, names: (folder / INDEX).write_text(text, "utf-8")


def move(key, name):
    return edit(lambda weight_map, names: weight_map.update({key: name}))


def link_out(folder, names):
    target = folder.parent / "elsewhere.safetensors"
    (folder / names[0]).rename(target)
    (folder / names[0]).symlink_to(target)


def drop_tensor(folder, names):
    tensors = load_file(folder / names[0])
    del tensors[min(tensors)]
    save_file(tensors, folder / names[0])


def add_tensor(folder, names):
    save_file(load_file(folder / names[0]) | {"more": torch.zeros(2)}, folder / names[0])


KEY = "base_model.model.classifier.bias"
SPOILED = {
    "no index": (lambda folder, names: (folder / INDEX).unlink(), ["adapter_model-00001-of-", "no index"]),
    "a shard is missing": (lambda folder, names: (folder / names[1]).unlink(), ["lacks adapter_model-00002-of-", INDEX]),
    "a shard is cut": (lambda folder, names: os.truncate(folder / names[1], 9), ["adapter_model-00002-of-", "whole"]),
    "a file too many": (
        lambda folder, names: (folder / "adapter_model-00009-of-00009.safetensors").touch(),
        ["adapter_model-00009-of-00009.safetensors", "does not name", "earlier save"],
    ),
    "one file too": (
        lambda folder, names: save_file({"x": torch.zeros(1)}, folder / WEIGHTS_FILE),
        [WEIGHTS_FILE, "shards of another save", "remove"],
    ),
    "a folder above": (move(KEY, "../adapter_model.safetensors"), [KEY, "'../adapter_model.safetensors'", "same folder"]),
    "an absolute path": (move(KEY, "/etc/x.safetensors"), [KEY, "'/etc/x.safetensors'", "same folder"]),
    "a folder below": (move(KEY, "x/y.safetensors"), [KEY, "'x/y.safetensors'", "same folder"]),
    "two lines": (move(KEY, "x\n.safetensors"), [KEY, r"'x\n.safetensors'", "same folder"]),
    "a pickle": (move(KEY, "adapter_model.bin"), [KEY, "'adapter_model.bin'", "safetensors file"]),
    "no name": (move(KEY, 7), [KEY, "7", "same folder"]),
    "a link": (link_out, ["adapter_model-00001-of-", "link out of its folder"]),
    "another file": (
        edit(lambda weight_map, names: weight_map.update({KEY: names[weight_map[KEY] == names[0]]})),
        [KEY, "save the adapter again"],
    ),
    "a key too many": (edit(lambda weight_map, names: weight_map.update(more=names[0])), ["lacks more"]),
    "a key too few": (edit(lambda weight_map, names: weight_map.pop(KEY)), [f"has {KEY}", "does not put there"]),
    "a tensor too few": (drop_tensor, ["lacks base_model", "which the index puts there"]),
    "a tensor too many": (add_tensor, ["has more", "does not put there"]),
    "no map": (put("{}"), [INDEX, "weight_map"]),
    "an empty map": (put('{"weight_map": {}}'), [INDEX, "weight_map"]),
    "a list": (put("[]"), [INDEX, "weight_map"]),
    "not JSON": (put("weight_map"), [INDEX, "JSON"]),
    "nested": (put("[" * 500_000), [INDEX, "JSON"]),
    "a key twice": (
        put('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        [INDEX, "a is there more than once"],
    ),
    "huge": (put(" " * ((16 << 20) + 1)), [INDEX, "larger"]),
    "thousands of files": (
        put(json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(1001)}})),
        ["1001 files"],
    ),
}


@pytest.mark.parametrize(("spoil", "named"), SPOILED.values(), ids=SPOILED)
def test_spoiled_shards_are_refused(folders, spoil, named):
    spoil(folders[1], save_in_shards(folders[1]))
    with refused("client 1", folders[1], *named):
        fedrot.aggregate(folders)


def test_the_index_of_a_base_model_beside_the_adapter_is_not_its_own(folders):
    expected = fedrot.aggregate(folders).state_dict
    (folders[0] / INDEX).write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}', "utf-8")
    assert_same(fedrot.aggregate(folders).state_dict, expected)


def named_model(*names):
    kind = KINDS["linear"]
    model = peft.get_peft_model(base_model(kind), peft.LoraConfig(r=4, **kind.config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(r=2, **kind.config))
    return model


def test_the_folder_above_a_named_adapter(tmp_path):
    model = named_model("fred")
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / CONFIG_FILE).exists()
    state_dict, config = fedrot.read_adapter(tmp_path / "saved")
    assert_same(state_dict, peft.get_peft_model_state_dict(model, adapter_name="fred"))
    assert config == fedrot.read_adapter(tmp_path / "saved" / "fred")[1] and config["r"] == 4


def test_the_folder_above_several_named_adapters(tmp_path):
    named_model("fred", "wilma").save_pretrained(tmp_path / "saved")
    with refused("the adapter", "fred, wilma", tmp_path / "saved" / "fred"):
        fedrot.read_adapter(tmp_path / "saved")
    named_model("default", "wilma").save_pretrained(tmp_path / "other")  # what PEFT loads of it is default
    assert fedrot.read_adapter(tmp_path / "other")[1]["r"] == 4


def test_a_link_is_no_named_adapter(tmp_path):
    (elsewhere,) = save_clients(LINEAR, tmp_path / "elsewhere", 1)
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "fred").symlink_to(elsewhere)
    with refused(tmp_path / "client", CONFIG_FILE):
        fedrot.read_adapter(tmp_path / "client")
