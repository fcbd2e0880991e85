"""GLUE's tasks by name and by their columns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from transformers import AutoTokenizer

from fedrot.simulation import SimulationConfig, load_task
from fedrot.simulation.clients import Clients
from fedrot.simulation.tasks.data import GLUE, encode_classes, hub_name

from ..language_models import train_two

COLUMNS = {
    "sst2": ("sentence",),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
}
TEXTS = ["a good film", "a bad play", "fine film", "poor play"]


@pytest.fixture
def configure(tiny_bert, tmp_path):
    """A configuration on a TSV of the given columns, which hold different texts."""

    def make(columns, classes=2, **options):
        lines = ["\t".join([*columns, "label", "idx"])]
        texts = [[TEXTS[(i + at) % 4] for at in range(len(columns))] for i in range(12)]
        lines += ["\t".join([*row, str(i % classes), str(i)]) for i, row in enumerate(texts)]
        (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
        lora = {"r": 2, "target_modules": ["query"]}
        data = {"model": str(tiny_bert), "dataset": str(tmp_path / "train.tsv"), "lora": lora, "clients": 2}
        return SimulationConfig(**data | options)

    return make


@pytest.mark.parametrize("name", COLUMNS)
def test_the_texts_are_found_by_their_columns(name, configure, tiny_bert):
    task = load_task(configure(COLUMNS[name], classes=3 if name == "mnli" else 2))
    assert task.classes == (["0", "1", "2"] if name == "mnli" else ["0", "1"])
    batch = task.collate(task.train, np.arange(len(task.train)), torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    for ids, label, row in zip(batch["input_ids"], batch["labels"], task.train, strict=True):
        texts = " [SEP] ".join(row[column] for column in COLUMNS[name])
        assert tokenizer.decode(ids).replace(" [PAD]", "") == f"[CLS] {texts} [SEP]"
        assert label == row["label"]


def test_columns_that_are_named_come_first(configure):
    task = load_task(configure(("premise", "hypothesis"), text_column="hypothesis"))
    batch = task.collate(task.train, np.arange(2), torch.device("cpu"))
    assert (batch["input_ids"] == 3).sum() == 2, "one text each, one [SEP]"


def test_text_is_known_but_a_glue_tasks_columns_come_first(configure):
    for columns, text in ((("other", "text"), "text"), (("text", "sentence"), "sentence")):
        task = load_task(configure(columns))
        assert (
            task.encode(task.train[:3])["input_ids"].tolist()
            == (AutoTokenizer.from_pretrained(task.base_model.name_or_path)(task.train[text][:3], padding=True)["input_ids"])
        )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("words",), "no column of text that is known; its columns are words, label, idx; set text_column, and text_pair"),
        (
            ("premise", "hypothesis", "sentence"),
            "several known columns of text; its columns are premise, hypothesis, sentence",
        ),
    ],
)
def test_texts_that_are_not_known_are_asked_for(configure, columns, message):
    with pytest.raises(ValueError, match=message):
        load_task(configure(columns))


@pytest.mark.parametrize("name", COLUMNS)
def test_glue_by_name(name, tmp_path, monkeypatch):
    config = SimulationConfig(model="m", dataset=name)
    split = "validation_matched" if name == "mnli" else "validation"
    assert hub_name(config) == (GLUE, name, split)
    assert hub_name(replace(config, dataset="glue", dataset_config=name)) == (GLUE, name, split)
    assert hub_name(replace(config, test_split="validation_mismatched")) == (GLUE, name, "validation_mismatched")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert hub_name(config) == (name, None, "validation"), "a folder of that name is the user's own data"


def test_a_pair_without_its_first_text_is_refused():
    with pytest.raises(ValueError, match="text_pair_column needs text_column"):
        SimulationConfig(model="m", dataset="d.csv", text_pair_column="b")


def test_withheld_classes_are_refused():
    features = Features({"label": ClassLabel(names=["no", "yes"])})
    train, test = (Dataset.from_list([{"label": label} for label in some], features) for some in ((0, 1), (0, -1, -1)))
    with pytest.raises(ValueError, match="the class of 2 of 3 rows of the test data is withheld; use another split"):
        encode_classes(train, test, "label")


def test_a_bfloat16_base_trains_a_float32_head(configure):
    config = configure(("sentence",), dtype="bfloat16", lr=1e-3, local_steps=2, batch_size=4, gradient_checkpointing=True)
    clients = Clients(load_task(config), config)
    assert {p.dtype for p in clients.parameters.values()} == {torch.float32}
    assert clients.task.base_model.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    start = clients.state()
    (state, _), losses = train_two(clients)
    head = next(name for name in start if "classifier" in name and name.endswith("weight"))
    # Two AdamW steps of 1e-3: bfloat16, of 8 bits, would lose part of them.
    assert (state[head] - start[head]).abs().max() == pytest.approx(2e-3, rel=0.05) and losses.isfinite().all()
    assert np.isfinite(clients.evaluate(state)["loss"])


def test_classes_keep_their_names_whatever_numbers_they_are():
    train, test = (Dataset.from_dict({"label": labels}) for labels in ([3, 1, 2, 1], [2, 3, 1]))
    train, test = encode_classes(train, test, "label")
    assert train.features["label"].names == ["1", "2", "3"]
    assert train["label"][:] == [2, 0, 1, 0] and test["label"][:] == [1, 2, 0]


def test_each_client_has_the_mean_loss_of_its_own_rows(configure):
    task = load_task(configure(("sentence",)))
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 0, 1])
    each = [-logits[i].log_softmax(0)[labels[i]].item() for i in range(6)]
    assert task.losses(logits, labels, 2).tolist() == pytest.approx([np.mean(each[:3]), np.mean(each[3:])], rel=1e-12)
    assert task.losses(logits.bfloat16(), labels, 2).dtype == torch.float32
