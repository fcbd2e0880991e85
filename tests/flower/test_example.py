"""The template app ends where ``fedrot simulate`` ends, on Flower's simulation engine and without one."""

import gc
import io
import json
import shutil
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import flatten_dict
from flwr.serverapp.exception import AggregationError
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from fedrot import METHODS
from fedrot.adapters.keys import factor_of
from fedrot.flower import FedRot
from fedrot.methods.registry import make_method
from fedrot.options import OPTION_NAMES, AggregationOptions
from fedrot.simulation import SimulationConfig, Task, load_task, simulate

from ..language_models import save_llama
from .app_runs import APP, AppGrid, config_of, engine, run_config, run_locally

pytestmark = pytest.mark.slow

# Plain SGD: Adam's division by the size of a gradient turns the rounding of a small one into a step.
QUICK = {"rounds": 2, "local_steps": 3, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "max_test_examples": 100}
CLIENTS = 4
WORDS = ["the", "a", "good", "bad", "film", "play", "fine", "poor", "is", "was"]


@pytest.fixture(scope="module", autouse=True)
def collectable() -> Iterator[None]:
    """The app takes what there is out of garbage collection; other modules' tests get it back."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def tasks():
    """The digits in float32, and in float64: a simulation with them is the truth that the others are held to."""
    return in_both_precisions(SimulationConfig(**QUICK))


def in_both_precisions(config: SimulationConfig) -> tuple[Task, Task]:
    single, double = load_task(config), load_task(config)
    double.base_model.double()
    return single, double


def outcome(folder: Path, method: str = "fedrot") -> dict[str, torch.Tensor]:
    """What a run ended with, in float64: the adapter, and what the method changed in the base weights."""
    if (folder / "shared.safetensors").exists():
        found = load_file(folder / "shared.safetensors")
    elif method == "fedsa-lora":
        clients = load_file(folder / "adapters/client0/adapter_model.safetensors")
        found = {key: x for key, x in clients.items() if factor_of(key) != "B"}
    else:
        found = load_file(folder / "adapter/adapter_model.safetensors")
    found = {key: x.double() for key, x in found.items()}
    if method == "flexlora":  # the signs of singular vectors are anybody's choice
        for key_B in [key for key in found if factor_of(key) == "B"]:
            found[key_B] = found[key_B] @ found.pop(key_B.replace("lora_B", "lora_A"))
    if METHODS[method].updates_base:
        base, folded = (load_file(folder / name / "model.safetensors") for name in ("base_model", "folded_model"))
        found |= {f"base {key}": folded[key].double() - x.double() for key, x in base.items()}
    return found


def distance(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
    """‖x − y‖ / ‖y‖, Frobenius, over all tensors."""
    assert x.keys() == y.keys()
    return float(sum((x[key] - y[key]).square().sum() for key in y) / sum(y[key].square().sum() for key in y)) ** 0.5


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_against_simulator(folder: Path, config: SimulationConfig, tasks, tmp_path: Path) -> float:
    """Hold a run of the app to the simulator's own rounding, and return that."""
    single, double = (
        simulate(config, tmp_path / name, task=task, progress=False)
        for name, task in zip(("single", "double"), tasks, strict=True)
    )
    truth = outcome(double.folder, config.method)
    lost = distance(outcome(single.folder, config.method), truth)
    assert lost < 1e-4, "this schedule amplifies rounding: nothing could be said of the app"
    assert distance(outcome(folder, config.method), truth) <= 3 * lost
    assert len(single.metrics) == config.rounds
    for row, simulated in zip(rows(folder), single.metrics, strict=True):
        measures = row.keys() & simulated.keys() - {"method", "clients", "dropped"}
        assert measures >= {"loss", "train_loss", "rotation_angle"}
        for name in measures - {"accuracy"}:
            # The server knows nothing of what FedSA-LoRA's averages lose.
            given = row[name] is not None or config.method != "fedsa-lora"
            assert not given or row[name] == pytest.approx(simulated[name], rel=1e-3, abs=1e-6), name
        assert row.get("accuracy") == pytest.approx(simulated.get("accuracy"), abs=0.01)
    return lost


def test_ten_clients_on_flowers_simulation_engine(tasks, tmp_path):
    app = tmp_path / "app"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    with engine(10) as nodes:
        log = nodes.run(app, output=str(tmp_path / "run"), **QUICK).finish()
    folder = tmp_path / "run"
    assert "2 of 2: accuracy 0." in log and "10 clients, 0 dropped" in log and f"results are in {folder}" in log
    assert [row["clients"] for row in rows(folder)] == [[f"client {c}" for c in range(10)]] * 2
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    config = SimulationConfig(**yaml.safe_load((folder / "config.yaml").read_text()))
    assert config == config_of(10, **QUICK) and config.clients == 10
    lost = check_against_simulator(folder, config, tasks, tmp_path)
    other = simulate(replace(config, seed=1), tmp_path / "other", task=tasks[0], progress=False)
    assert distance(outcome(folder), outcome(other.folder)) > 1e4 * lost


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_simulators(method, tasks, tmp_path):
    folder = run_locally(tmp_path / "run", CLIENTS, method=method, **QUICK)
    check_against_simulator(folder, SimulationConfig(method=method, clients=CLIENTS, **QUICK), tasks, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "weight_decay": 0.01, "max_grad_norm": 1.0, "batch_size": 60},  # more than an epoch
        {
            "optimizer": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.1,
            "server_optimizer": "adam",
            "align_on": "joint",
            "lora.lora_dropout": 0.1,
        },
        {"seed": 5, "dirichlet_alpha": 0.1, "lora.r": 2, "lora.target_modules": ".*(q_proj|v_proj)", "strength": 0.7},
    ],
    ids=["momentum", "adamw", "seed"],
)
def test_options_are_the_simulators(options, tasks, tmp_path):
    folder = run_locally(tmp_path / "run", CLIENTS, **QUICK | options)
    config = config_of(CLIENTS, **QUICK | options)
    check_against_simulator(folder, config, tasks, tmp_path)


@pytest.fixture
def sentences(tmp_path):
    """A TSV of sentences with a class."""
    lines = [f"{WORDS[i % 7]} {WORDS[i % 10]} {WORDS[i % 3 + 4]}\t{i % 2}" for i in range(60)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return str(tmp_path / "train.tsv")


def save_bert(folder: Path) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_text_classification_by_configuration(sentences, tmp_path):
    text = {"model": save_bert(tmp_path / "bert"), "dataset": sentences, "lora.target_modules": ".*(query|value)"}
    check_text(QUICK | text, tmp_path)


def test_a_language_model_by_configuration(sentences, tmp_path):
    text = {"model": str(save_llama(tmp_path / "llama")), "dataset": sentences, "task": "causal-lm", "max_length": 16}
    templates = {"prompt_template": "Review: {sentence}", "response_template": " {label}", "label_column": "label"}
    check_text(QUICK | text | templates, tmp_path)


def check_text(options, tmp_path):
    config = config_of(2, **options)
    folder = run_locally(tmp_path / "run", 2, **options)
    check_against_simulator(folder, config, in_both_precisions(config), tmp_path)


def test_the_text_model_that_comes_with_the_app():
    options = flatten_dict(tomllib.loads((APP / "text.toml").read_text("utf-8")))
    config = config_of(10, **options)
    assert (config.task, config.label_column, config.clients) == ("text-classification", "label", 10)
    assert config.lora == {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ".*(query|value)"}


# Another value than the default, for every option of the aggregation.
OTHERS = {
    "method": "fedrot-consensus",
    "align_on": "B",
    "strength": 0.25,
    "reflections": True,
    "on_invalid": "raise",
    "backend": "torch",
    "report_error": False,
    "seed": 7,
}


def test_the_run_configuration_has_every_option_of_the_aggregation():
    assert OTHERS.keys() == set(OPTION_NAMES)
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


def test_clients_evaluate_where_that_is_asked_for(tmp_path):
    measured = rows(run_locally(tmp_path / "run", 3, fraction_evaluate=1.0, **QUICK))
    assert len(measured) == QUICK["rounds"]
    for row in measured:
        assert row["clients_accuracy"] == pytest.approx(row["accuracy"])  # their shares are the whole test data
        assert row["clients_loss"] == pytest.approx(row["loss"])


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
