"""The embedded tasks: what is pretrained on, what clients learn, and the cache of the models."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedrot.simulation import SimulationConfig, load_task
from fedrot.simulation.tasks import stdlib
from fedrot.simulation.tasks.cache import cache_folder, cached_model
from fedrot.simulation.tasks.digits import digits_model

from ..language_models import SIZES

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """The base model of the standard library after a few steps; the cache knows one from the other."""
    monkeypatch.setattr(stdlib, "_STEPS", 15)
    monkeypatch.setattr(stdlib, "_BATCH", 2)


@pytest.fixture
def counted():
    """Makes cached models, and counts how often one is built."""
    builds = []

    def build():
        builds.append(1)
        torch.manual_seed(5)
        return LlamaForCausalLM(LlamaConfig(vocab_size=20, **SIZES))

    return lambda key: (cached_model("counted", LlamaForCausalLM, key, build), len(builds))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fedrot"


def equal(first, second):
    return all(torch.equal(x, y) for x, y in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_a_model_is_built_once_for_what_determines_it(cache, counted):
    (first, _), (again, builds) = counted({"steps": 1}), counted({"steps": 1})
    assert builds == 1 and equal(first, again) and not first.training and not again.training
    assert counted({"steps": 2})[1] == 2
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "configuration", "unfinished"])
def test_a_broken_cache_is_built_again(cache, counted, damage):
    first = copy.deepcopy(counted({})[0])  # what is loaded may still be the file itself
    (folder,) = cache.iterdir()
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[:-100])
    elif damage == "changed":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    elif damage == "configuration":
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    else:
        (folder / "sha256").unlink()
    repaired, builds = counted({})
    assert builds == 2 and equal(first, repaired)
    assert counted({})[1] == 2 and weights.read_bytes() == content
    assert [path.name for path in cache.iterdir()] == [folder.name], "nothing half-written stays"


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, counted):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert counted({})[1] == 1


def test_without_a_variable_the_cache_is_in_the_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(cache_folder()) == "/somewhere/.cache/fedrot"


def test_the_digits_model_comes_from_the_cache():
    first, before = digits_model(), sorted(path.name for path in cache_folder().iterdir())
    again = digits_model()
    assert equal(first, again) and before == sorted(path.name for path in cache_folder().iterdir())
    assert any(name.startswith("digits-") for name in before)


def test_the_clients_are_packages_and_their_held_out_files_are_tested():
    train, test = stdlib.stdlib_data(256)
    assert set(train["package"]) == set(test["package"]) == set(stdlib.PACKAGES)
    sizes = {package: train["package"][:].count(package) for package in stdlib.PACKAGES}
    assert min(sizes.values()) > 100, "every package has enough source"
    assert all(len(ids) == 256 for ids in test["input_ids"])
    for package in ("json", "email"):
        folder = stdlib.stdlib_folder() / package
        files = {path: path.read_bytes() for path in sorted(folder.rglob("*.py"))}
        held_out = {path for i, path in enumerate(files) if i % 5 == 2}
        for data, right in ((train, files.keys() - held_out), (test, held_out)):
            source = b"".join(content for path, content in files.items() if path in right)
            mine = [bytes(row["input_ids"]) for row in data if row["package"] == package]
            assert mine and all(window in source for window in mine)


def test_no_client_holds_what_the_base_model_has_read():
    """Packages are folders, and it reads the files beside them."""
    assert all((stdlib.stdlib_folder() / package).is_dir() for package in stdlib.PACKAGES)
    assert not {path.stem for path in stdlib.stdlib_folder().glob("*.py")} & set(stdlib.PACKAGES)


def test_the_standard_library_as_a_task(quick):
    config = SimulationConfig(model="stdlib", dataset="stdlib", max_length=256, max_train_examples=500, max_test_examples=40)
    assert (config.task, config.partition, config.partition_column) == ("causal-lm", "column", "package")
    task = load_task(config)
    assert (len(task.train), len(task.test), task.labels) == (500, 40, None)
    measured = task.evaluate(task.base_model, 16, CPU)
    assert measured.keys() == {"loss"} and measured["loss"] < np.log(256) - 1, "pretraining taught it something"
    again = stdlib._pretrain(b"".join(path.read_bytes() for path in sorted(stdlib.stdlib_folder().glob("*.py"))))
    assert equal(task.base_model, again), "pretraining is deterministic"
    by_class = SimulationConfig(
        model="stdlib", dataset="stdlib", label_column="package", partition="dirichlet", max_length=256
    )
    task = load_task(by_class)
    assert [task.classes[i] for i in task.labels] == task.train["package"][:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "stdlib", "model": "m"}, 'the model "stdlib" and the dataset "stdlib" go together'),
        ({"model": "stdlib", "dataset": "stdlib", "task": "text-classification"}, "the task of stdlib is causal-lm"),
        ({"task": "causal-lm"}, "the task of digits is image-classification"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"score_examples": 0}, "score_examples must be at least 1"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        SimulationConfig(**options)
