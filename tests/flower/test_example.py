"""The template app ends where ``fedrot simulate`` ends, on Flower's simulation engine and without one."""

import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from flwr.common.config import flatten_dict
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from fedrot import METHODS
from fedrot.simulation import SimulationConfig, simulate

from ..language_models import save_llama
from .app_results import QUICK, check_against_simulator, distance, in_both_precisions, outcome, rows
from .app_runs import APP, config_of, engine, run_locally

pytestmark = pytest.mark.slow

CLIENTS = 4
WORDS = ["the", "a", "good", "bad", "film", "play", "fine", "poor", "is", "was"]


@pytest.fixture(scope="module")
def tasks():
    """The digits in float32, and in float64: a simulation with them is the truth that the others are held to."""
    return in_both_precisions(SimulationConfig(**QUICK))


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


# The app has no code of its own for what these are to flexlora and fedex-lora.
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("glora", "fedmomentum", "flora-na")])
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


def test_clients_evaluate_where_that_is_asked_for(tmp_path):
    measured = rows(run_locally(tmp_path / "run", 3, fraction_evaluate=1.0, **QUICK))
    assert len(measured) == QUICK["rounds"]
    for row in measured:
        assert row["clients_accuracy"] == pytest.approx(row["accuracy"])  # their shares are the whole test data
        assert row["clients_loss"] == pytest.approx(row["loss"])
