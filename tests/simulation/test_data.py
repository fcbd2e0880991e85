"""What the simulator makes of users' files and models, and what it refuses before anything is written."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from fedrot import UpdateError, read_adapter
from fedrot.simulation import SimulationConfig, load_task, simulate
from fedrot.simulation.clients import Clients

from .test_run import QUICK

BERT_LORA = {"r": 2, "target_modules": ["query"]}


@pytest.fixture
def text(tiny_bert, tmp_path):
    """A configuration on a file of the given content."""

    def configure(content, name="train.tsv", **options):
        (tmp_path / name).write_text(content, "utf-8")
        files = {"model": str(tiny_bert), "dataset": str(tmp_path / name), "text_column": "text", "test_fraction": 0.2}
        return SimulationConfig(**QUICK | files | {"lora": BERT_LORA} | options)

    return configure


def test_a_tsv_holds_what_it_says(text):
    rows = ['a "good film', 'a bad" film', "NA", "null", '"', "a film", "fine", "poor", "good", "bad"]
    task = load_task(text("text\tlabel\n" + "".join(f"{row}\t{i % 2}\n" for i, row in enumerate(rows))))
    assert sorted([*task.train["text"], *task.test["text"]]) == sorted(rows)


@pytest.mark.parametrize(
    ("content", "name", "options", "message"),
    [
        ('{"text": null, "label": 1}\n{"text": "a", "label": 0}\n' * 9, "t.jsonl", {}, "have nothing in column 'text'"),
        ('{"text": "a", "label": null}\n{"text": "a", "label": 0}\n' * 9, "t.jsonl", {}, "have nothing in column 'label'"),
        ("text,label\n" + "1,0\n2,1\n" * 9, "t.csv", {}, "column text holds int64, not text"),
        ("text,label\n" + "a,0.5\nb,1.5\n" * 9, "t.csv", {}, "column label holds floating-point numbers"),
        ('{"text": "a", "label": 0}\nnot json\n' * 9, "t.jsonl", {}, "t.jsonl cannot be read as json"),
        ("text,label\n" + "a,0\nb,1\n" * 9, "t.csv", {"partition": "column", "partition_column": "site"}, "'site'"),
        ("text,label\n" + "a,0\nb,1\n" * 9, "t.csv", {"model": "/no/such/model"}, "no model folder /no/such/model"),
        ("text,label\n" + "a,0\nb,1\n" * 9, "t.csv", {"clients_per_round": 9}, "clients_per_round is 9, but there are 4"),
        ("text,label\n" + "a,0\nb,1\n" * 9, "t.csv", {"device": "nonsense"}, "device 'nonsense' cannot be used"),
    ],
)
def test_data_that_cannot_be_used_is_refused_before_anything_is_written(text, tmp_path, content, name, options, message):
    with pytest.raises(ValueError, match=message):
        simulate(text(content, name, **options), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_test_file_without_the_text_is_refused(text, tmp_path):
    (tmp_path / "test.csv").write_text("words,label\na,0\n")
    config = text("text,label\n" + "a,0\nb,1\n" * 9, "t.csv", test_dataset=str(tmp_path / "test.csv"))
    with pytest.raises(ValueError, match="the test data has no column 'text'"):
        load_task(config)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lora": {"r": 2, "kasa_config": {}, "target_modules": ["q_proj"]}}, (UpdateError, ValueError), "lora_diag|kasa"),
        ({"lora": {"r": 2, "init_lora_weights": "olora"}, "start": "independent"}, ValueError, "not 'olora'"),
        (
            {"lora": {"target_modules": ["fc1", "query"]}},
            ValueError,
            "no module 'query'; its linear layers are .*fc2.* q_proj",
        ),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm must be positive"),
        ({"momentum": -1, "optimizer": "sgd"}, ValueError, "momentum must not be negative"),
        ({"seed": -1}, ValueError, "seed must be a whole number from 0, got -1"),
    ],
)
def test_options_that_cannot_work_leave_no_folder(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        simulate(SimulationConfig(**QUICK | options), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_language_model_without_padding_classifies(text, tiny_bert, tmp_path):
    folder = tmp_path / "gpt2"
    PreTrainedTokenizerFast(tokenizer_file=str(tiny_bert / "tokenizer.json"), eos_token="[SEP]").save_pretrained(folder)
    sizes = {"vocab_size": 12, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2ForSequenceClassification(GPT2Config(**sizes, bos_token_id=2, eos_token_id=3)).save_pretrained(folder)
    content = "text,label\n" + "a good film,1\na bad play and film,0\n" * 9
    config = text(content, "t.csv", model=str(folder), lora={"r": 2, "target_modules": ["c_attn"]})
    assert simulate(config, tmp_path / "run", progress=False).metrics[-1]["accuracy"] >= 0


@pytest.fixture
def images(tmp_path):
    """A configuration on a folder of pictures, with a convolutional model that has batch statistics."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("validation", 4)):
        for label, shade in (("dark", 40), ("light", 200)):
            (tmp_path / "pictures" / split / label).mkdir(parents=True)
            for i in range(n):
                pixels = (shade + rng.integers(-30, 30, (16, 16, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / split / label / f"{i}.png")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=7)).save_pretrained(tmp_path / "resnet")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "resnet")
    files = {"model": str(tmp_path / "resnet"), "dataset": str(tmp_path / "pictures"), "task": "image-classification"}
    lora = {"lora": {"r": 2, "target_modules": ["convolution"]}}
    return SimulationConfig(**QUICK | files | lora | {"partition": "iid", "clients": 3, "local_steps": 10, "lr": 0.02})


def test_pictures_train_a_new_head_that_is_saved(images, tmp_path):
    result = simulate(images, tmp_path / "run", progress=False)
    assert result.accuracy > 0.9
    assert any("classifier" in key for key in read_adapter(tmp_path / "run" / "adapter")[0])


def test_batch_statistics_are_frozen_with_the_base(images):
    clients = Clients(load_task(images), images)
    before = {name: x.clone() for name, x in clients.model.named_buffers()}
    clients.train(0, [0, 1, 2], [clients.state()] * 3, lambda n: None)
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(x, before[name]) for name, x in clients.model.named_buffers())
