"""Folders that cannot be read or trusted: refused, by the file's name, and never run."""

import json
import math
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

import fedrot

from ..refusals import CONFIG_FILE, WEIGHTS_FILE, A, refused


class WritesAFile:
    """What a hostile client would send: a pickle that acts when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(size):
    return lambda folder: os.truncate(folder / WEIGHTS_FILE, size((folder / WEIGHTS_FILE).stat().st_size))


def tensors(**changed):
    return lambda folder: save_file(fedrot.read_adapter(folder)[0] | changed, folder / WEIGHTS_FILE)


BROKEN_FOLDERS = {
    "no configuration": (lambda folder: (folder / CONFIG_FILE).unlink(), [CONFIG_FILE]),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), [WEIGHTS_FILE]),
    "not there": (lambda folder: folder.rename(folder.with_name("gone")), ["there is no folder"]),
    "last byte missing": (cut(lambda size: size - 1), [WEIGHTS_FILE]),
    "half missing": (cut(lambda size: size // 2), [WEIGHTS_FILE]),
    "header cut": (cut(lambda size: 20), [WEIGHTS_FILE]),
    "empty": (cut(lambda size: 0), [WEIGHTS_FILE]),
    "header of 2⁶³ bytes": (write(WEIGHTS_FILE, b"\xff" * 7 + b"\x7f" + b"{}"), [WEIGHTS_FILE]),
    "configuration not JSON": (write(CONFIG_FILE, "peft_type: LORA"), [CONFIG_FILE, "not JSON"]),
    "configuration empty": (write(CONFIG_FILE, ""), [CONFIG_FILE, "not JSON"]),
    "configuration not text": (write(CONFIG_FILE, b"\xff\xfe\x00"), [CONFIG_FILE, "not JSON"]),
    "configuration nested": (write(CONFIG_FILE, "[" * 500_000), [CONFIG_FILE, "not JSON"]),
    "configuration a list": (write(CONFIG_FILE, '["LORA"]'), [CONFIG_FILE]),
    "configuration a word": (write(CONFIG_FILE, '"LORA"'), [CONFIG_FILE]),
    "configuration huge": (write(CONFIG_FILE, '{"peft_type": "LORA"' + " " * (1 << 20) + "}"), [CONFIG_FILE, "larger"]),
    "integers": (tensors(**{"x.lora_A.weight": torch.ones(2, 3, dtype=torch.int64)}), ["x.lora_A", "I64", "(2, 3)"]),
    "8 bits": (tensors(head=torch.ones(3).to(torch.float8_e4m3fn)), ["head", "F8_E4M3", "(3,)"]),
    "adapter's name in a key": (tensors(**{"x.lora_A.default.weight": torch.ones(2, 3)}), ["x.lora_A.default.weight"]),
    "NaN": (tensors(**{A: torch.full((4, 16), math.nan)}), [A, "(4, 16)", "NaN"]),
}


@pytest.mark.parametrize(("spoil", "named"), BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_a_broken_folder_is_refused(folders, spoil, named):
    reference = fedrot.read_adapter(folders[0])[0]
    spoil(folders[1])
    for updates in (folders[::-1], [reference, folders[1]]):
        with refused(f"client {updates.index(folders[1])}", folders[1], *named):
            fedrot.aggregate(updates, reference=reference)
    with refused(f"the reference ({folders[1]})", *named):
        fedrot.align(folders[0], folders[1])


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS_FILE])
def test_a_pickle_is_refused_and_never_run(folders, name, tmp_path):
    (folders[1] / WEIGHTS_FILE).unlink()
    (folders[1] / name).write_bytes(pickle.dumps(WritesAFile(tmp_path / "ran")))
    with refused("client 1", folders[1] / name, "safetensors"):
        fedrot.aggregate(folders)
    with refused(folders[1] / name, "safetensors"):
        fedrot.read_adapter(folders[1])
    assert not (tmp_path / "ran").exists()
    pickle.loads((folders[1] / name).read_bytes())  # it would have acted: what was refused above was live
    assert (tmp_path / "ran").exists()


SCALING = {"lora_alpha": 32, "use_rslora": True, "alpha_pattern": {"query": 1}, "use_dora": True}


@pytest.mark.parametrize(("field", "value"), SCALING.items())
def test_folders_whose_factors_mean_different_updates_are_refused(folders, field, value):
    config = json.loads((folders[1] / CONFIG_FILE).read_text("utf-8"))
    (folders[1] / CONFIG_FILE).write_text(json.dumps(config | {field: value}), "utf-8")
    with refused("client 1", "client 0", *folders, field, repr(value), repr(config[field])):
        fedrot.aggregate(folders, method="fedit")
    with refused("the reference", "client 0", field):
        fedrot.aggregate(folders[:1], reference=folders[1], method="fedit")
    with refused("the reference", "the update", field):
        fedrot.align(folders[0], folders[1])
    stream = fedrot.FedRotAggregator(method="fedit")
    stream.add(folders[0])
    with refused("client 1", field):
        stream.add(folders[1])
    assert stream.finish().report.clients == (f"client 0 ({folders[0]})",)


def test_a_folder_of_another_rank_than_its_tensors_is_refused(folders):
    config = json.loads((folders[1] / CONFIG_FILE).read_text("utf-8"))
    (folders[1] / CONFIG_FILE).write_text(json.dumps(config | {"r": 2}), "utf-8")
    with refused("client 1", folders[1], "(4, 16)", "rank 2"):
        fedrot.aggregate(folders, method="fedit")
    with refused(folders[1], "(4, 16)", "rank 2"):
        fedrot.FedRotAggregator(folders[1])


def test_a_reference_of_dora_and_clients_without_are_refused(folders):
    config = json.loads((folders[1] / CONFIG_FILE).read_text("utf-8"))
    (folders[1] / CONFIG_FILE).write_text(json.dumps(config | {"use_dora": True}), "utf-8")
    with refused("the reference", "client 0", "use_dora"):
        fedrot.aggregate(folders[:1], reference=folders[1])
