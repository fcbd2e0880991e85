"""What clients learn: the data, the model and how examples become the model's inputs."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from sklearn.metrics import accuracy_score
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from .config import SimulationConfig
from .digits import digits_data, digits_model

# Cells are what they say: in a TSV a quotation mark is one, and the word NA is not an absence.
_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}


@dataclass
class Task:
    """Everything of a simulation that does not depend on its seed.

    Attributes:
        train: the examples that clients share out.
        test: the examples that the server evaluates on.
        labels: (n,) class of every training example.
        num_labels: the number of classes.
        base_model: the pretrained model, without adapter; copy it before adding one.
        encode: rows of either dataset -> the model's inputs, without labels.
        label_column: where the classes stand.
    """

    train: Dataset
    test: Dataset
    labels: np.ndarray
    num_labels: int
    base_model: PreTrainedModel
    encode: Callable[[dict[str, list]], dict[str, Tensor]]
    label_column: str

    def collate(self, dataset: Dataset, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """The model's inputs and ``labels`` for these rows."""
        rows = dataset[indices.tolist()]
        inputs = {**self.encode(rows), "labels": torch.tensor(rows[self.label_column])}
        return {name: x.to(device) for name, x in inputs.items()}

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, batch_size: int, device: torch.device) -> dict[str, float]:
        """Accuracy and mean cross-entropy on the test examples."""
        was_training = model.training
        model.eval()
        logits, labels = [], []
        for start in range(0, len(self.test), batch_size):
            inputs = self.collate(self.test, np.arange(start, min(start + batch_size, len(self.test))), device)
            labels.append(inputs.pop("labels").cpu())
            logits.append(model(**inputs).logits.float().cpu())
        model.train(was_training)
        scores, truth = torch.cat(logits), torch.cat(labels)
        return {
            "accuracy": float(accuracy_score(truth, scores.argmax(1))),
            "loss": torch.nn.functional.cross_entropy(scores, truth).item(),
        }


def load_task(config: SimulationConfig, base_model: Path | None = None) -> Task:
    """Load data and model as configured.

    Args:
        config: the run.
        base_model: a folder to take the model's weights from instead, as saved with an earlier run.

    Raises:
        ValueError: missing columns or classes.
    """
    if config.dataset == "digits":
        train, test = digits_data()
        model = AutoModelForImageClassification.from_pretrained(base_model) if base_model else digits_model()
        return Task(train, test, np.array(train["label"]), 10, model, lambda rows: {"pixel_values": _pixels(rows)}, "label")

    if Path(config.model).is_absolute() and not Path(config.model).exists():
        raise ValueError(f"there is no model folder {config.model}")
    train, test = _load_datasets(config)
    columns = [config.label_column, config.image_column]
    if config.task == "text-classification":
        columns = [config.label_column, config.text_column, *([config.text_pair_column] if config.text_pair_column else [])]
    for column in columns:
        for name, data in (("the training data", train), ("the test data", test)):
            _check_column(data, column, name)
    if config.partition_column is not None:
        _check_column(train, config.partition_column, "the training data")
    for column in columns[1:] if config.task == "text-classification" else []:
        if "string" not in str(train.features[column].dtype):
            raise ValueError(f"column {column} holds {train.features[column].dtype}, not text")
    if "float" in str(train.features[config.label_column].dtype):
        raise ValueError(f"column {config.label_column} holds floating-point numbers, not classes")
    if not isinstance(train.features[config.label_column], ClassLabel):
        train = train.class_encode_column(config.label_column)
        classes = train.features[config.label_column]
        unknown = set(map(str, test.unique(config.label_column))) - set(classes.names)
        if unknown:
            some = ", ".join(sorted(unknown)[:3])
            raise ValueError(
                f"the test data has {len(unknown)} classes that the training data lacks, such as: {some:.200}; "
                f"is {config.label_column} the column of the class?"
            )
        # Through strings, which is how class_encode_column names classes: an integer would be taken for a position.
        test = test.cast_column(config.label_column, Value("string")).cast_column(config.label_column, classes)
    train, test = _subset(train, config.max_train_examples), _subset(test, config.max_test_examples)
    labels = np.array(train[config.label_column])
    num_labels = train.features[config.label_column].num_classes
    auto = AutoModelForSequenceClassification if config.task == "text-classification" else AutoModelForImageClassification
    # A model pretrained for other classes keeps its body and gets a new head.
    torch.manual_seed(0)
    model = auto.from_pretrained(config.model, num_labels=num_labels, ignore_mismatched_sizes=True)
    encode = _text_encoder(config, model) if config.task == "text-classification" else _image_encoder(config)
    return Task(train, test, labels, num_labels, model, encode, config.label_column)


def _load_datasets(config: SimulationConfig) -> tuple[Dataset, Dataset]:
    suffix = Path(config.dataset).suffix.lower()
    if suffix not in _LOADERS:
        loaded = load_dataset(config.dataset, config.dataset_config)
        for split in (config.train_split, config.test_split):
            if split not in loaded:
                raise ValueError(f"{config.dataset} has no split {split!r}; its splits are {', '.join(loaded)}")
        return loaded[config.train_split], loaded[config.test_split]
    train = _load_file(config.dataset)
    if config.test_dataset is not None:
        return train, _load_file(config.test_dataset)
    halves = train.train_test_split(test_size=config.test_fraction, seed=0)
    return halves["train"], halves["test"]


def _load_file(path: str) -> Dataset:
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file")
    if Path(path).suffix.lower() not in _LOADERS:
        raise ValueError(f"{path} is of no known kind; use {', '.join(_LOADERS)}")
    builder, options = _LOADERS[Path(path).suffix.lower()]
    try:
        return load_dataset(builder, data_files=path, split="train", **options)
    except DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read as {builder}: {error.__cause__ or error}") from error


def _check_column(data: Dataset, column: str, name: str) -> None:
    if column not in data.column_names:
        raise ValueError(f"{name} has no column {column!r}; its columns are {', '.join(data.column_names)}")
    if empty := sum(x is None for x in data[column]):
        raise ValueError(f"{empty} of {len(data)} rows of {name} have nothing in column {column!r}; leave them out")


def head_modules(model: PreTrainedModel) -> list[str]:
    """The modules beside a classifier's body, which start at random where the classes are new."""
    return [n for n, m in model.named_children() if n != model.base_model_prefix and any(True for _ in m.parameters())]


def _subset(dataset: Dataset, size: int | None) -> Dataset:
    return dataset if size is None or size >= len(dataset) else dataset.shuffle(seed=0).select(range(size))


def _pixels(rows: dict[str, list]) -> Tensor:
    return torch.tensor(rows["pixel_values"])


def _text_encoder(config: SimulationConfig, model: PreTrainedModel) -> Callable[[dict[str, list]], dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    if tokenizer.pad_token is None:  # language models have none; a classifier needs to know where a text ends
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    options = {"truncation": True, "max_length": config.max_length, "padding": True, "return_tensors": "pt"}

    def encode(rows: dict[str, list]) -> dict[str, Tensor]:
        pair = rows[config.text_pair_column] if config.text_pair_column else None
        return dict(tokenizer(rows[config.text_column], pair, **options))

    return encode


def _image_encoder(config: SimulationConfig) -> Callable[[dict[str, list]], dict[str, Tensor]]:
    processor = AutoImageProcessor.from_pretrained(config.model)
    return lambda rows: dict(processor([image.convert("RGB") for image in rows[config.image_column]], return_tensors="pt"))
