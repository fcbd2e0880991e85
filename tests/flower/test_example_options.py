"""The template app's options reach the strategy, its runs are resumed, and it says what is wrong with its nodes."""

import io
import shutil
import zipfile
from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml
from flwr.cli.build import build_fab_from_disk
from flwr.serverapp.exception import AggregationError

from fedrot.flower import FedRot
from fedrot.methods.registry import make_method
from fedrot.options import OF_UNEQUAL_RANKS, OPTION_NAMES, AggregationOptions

from .app_results import QUICK, rows
from .app_runs import APP, AppGrid, config_of, run_config, run_locally

pytestmark = pytest.mark.slow

# Another value than the default, for every option of the aggregation but those of unequal ranks, which nodes do not have.
OTHERS = {
    "method": "fedrot-consensus",
    "align_on": "B",
    "strength": 0.25,
    "reflections": True,
    "on_invalid": "raise",
    "backend": "torch",
    "report_error": False,
    "seed": 7,
    "robust": "multi-krum",
    "byzantine": 1,
    "clip": 0.5,
}


def test_the_run_configuration_has_every_option_of_the_aggregation():
    assert OTHERS.keys() == set(OPTION_NAMES) - set(OF_UNEQUAL_RANKS)
    assert OTHERS.keys() <= run_config().keys()
    defaults = {name: x for name, x in run_config().items() if name in OTHERS and x != ""}
    assert AggregationOptions(**defaults) == AggregationOptions(on_invalid="drop")


@pytest.mark.parametrize("options", [{}, OTHERS, {"method": "fedrot-least-error"}], ids=["defaults", "others", "method"])
def test_every_option_reaches_the_strategy(options, tmp_path, monkeypatch):
    from fedrot_flower_app import server_app

    class Made(Exception):
        pass

    def make(**given):
        raise Made(FedRot(**given))

    monkeypatch.setattr(server_app, "FedRot", make)
    with pytest.raises(Made) as caught:
        run_locally(tmp_path / "run", 2, **options)
    strategy = caught.value.args[0]
    expected = AggregationOptions(**{"on_invalid": "drop", "report_error": True} | options)  # exact, as in fedrot simulate
    assert strategy.options == replace(expected, strength=make_method(expected).strength)


class Interrupted(AppGrid):
    """Breaks off before the third round."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if any(message.content["config"]["server-round"] == 3 for message in messages):
            raise InterruptedError
        return super().send_and_receive(messages, timeout=timeout)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    options = QUICK | {"rounds": 3, "lora.lora_dropout": 0.1, "server_optimizer": "adam", "optimizer": "adamw"}
    whole = run_locally(tmp_path / "whole", 2, **options)
    with pytest.raises(InterruptedError):
        run_locally(tmp_path / "cut", 2, Interrupted, resume=True, **options)
    assert len(rows(tmp_path / "cut")) == 2 and not (tmp_path / "cut/adapter").exists()
    with pytest.raises(FileExistsError):
        run_locally(tmp_path / "cut", 2, **options)
    with pytest.raises(ValueError, match=r"cut was run with another lr; resume it as it was"):
        run_locally(tmp_path / "cut", 2, resume=True, **options | {"lr": 0.2})
    cut = run_locally(tmp_path / "cut", 2, resume=True, **options)
    assert [row["round"] for row in rows(cut)] == [1, 2, 3]
    files = ["metrics.jsonl", "config.yaml", "adapter/adapter_model.safetensors"]
    assert [(cut / file).read_bytes() for file in files] == [(whole / file).read_bytes() for file in files]


def test_a_run_of_fedrot_0_1_is_not_resumed(tmp_path):
    (tmp_path / "run").mkdir()
    before = asdict(config_of(2, **QUICK)) | {"group": "SO", "reference": "global"}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(before))
    with pytest.raises(ValueError, match="run of another fedrot, which had group, reference; name another output"):
        run_locally(tmp_path / "run", 2, resume=True, **QUICK)


def test_a_resumed_run_has_the_base_weights_of_an_uninterrupted_one(tmp_path):
    options = QUICK | {"rounds": 3, "method": "flora", "eval_every": 3}
    whole = run_locally(tmp_path / "whole", 2, **options)
    with pytest.raises(InterruptedError):
        run_locally(tmp_path / "cut", 2, Interrupted, **options)
    cut = run_locally(tmp_path / "cut", 2, resume=True, **options)
    assert ["accuracy" in row for row in rows(cut)] == [False, False, True]
    files = ["metrics.jsonl", "folded_model/model.safetensors", "adapter/adapter_model.safetensors"]
    assert [(cut / file).read_bytes() for file in files] == [(whole / file).read_bytes() for file in files]


def test_the_server_waits_for_as_many_clients_as_it_is_told(tmp_path, caplog):
    class Late(AppGrid):
        def get_node_ids(self):
            self.asked = getattr(self, "asked", -1) + 1
            return super().get_node_ids()[: 2 + self.asked]

    with caplog.at_level("INFO", "flwr"):
        folder = run_locally(tmp_path / "run", 3, Late, **QUICK | {"clients": 3, "rounds": 1})
    assert "waiting for 3 nodes (clients in the run configuration); 2 connected" in caplog.text
    assert rows(folder)[0]["clients"] == ["client 0", "client 1", "client 2"]


def test_a_node_that_is_no_client_of_the_partition_says_so(tmp_path):
    class Unnumbered(AppGrid):
        def __init__(self, nodes, config):
            super().__init__(nodes, config)
            self.contexts[100].node_config.clear()

    with pytest.raises(AggregationError, match="examples of 2 clients, but the federation has 3 nodes") as caught:
        run_locally(tmp_path / "run", 3, Unnumbered, clients=2)
    assert '--node-config "partition-id=0 num-partitions=3"' in str(caught.value)


def test_training_leaves_the_noise_of_differential_privacy_to_chance(tmp_path):
    """Flower draws it from NumPy's global generator, which Trainer seeds."""
    np.random.seed(123)
    run_locally(tmp_path / "run", 2, **QUICK | {"rounds": 1})
    assert np.random.random() == np.random.RandomState(123).random()


def test_results_are_no_part_of_the_app(tmp_path):
    app = tmp_path / "app"
    shutil.copytree(APP, app)
    (app / "runs/first").mkdir(parents=True)
    (app / "runs/first/config.yaml").write_text("method: fedrot\n")
    names = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))).namelist()
    modules = [f"fedrot_flower_app/{name}.py" for name in ("__init__", "client_app", "results", "server_app", "task")]
    assert sorted(names) == [".info/CONTENT", "README.md", *modules, "pyproject.toml"]
