"""What clients learn: the data, the model and how examples become the model's inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value, load_dataset
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

_LOADERS = {".csv": ("csv", {}), ".tsv": ("csv", {"sep": "\t"}), ".json": ("json", {}), ".jsonl": ("json", {})}


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

    train, test = _load_datasets(config)
    columns = [config.label_column, config.image_column]
    if config.task == "text-classification":
        columns = [config.label_column, config.text_column, *([config.text_pair_column] if config.text_pair_column else [])]
    for column in [*columns, *([config.partition_column] if config.partition_column else [])]:
        if column not in train.column_names:
            raise ValueError(f"{config.dataset} has no column {column!r}; its columns are {', '.join(train.column_names)}")
    if not isinstance(train.features[config.label_column], ClassLabel):
        train = train.class_encode_column(config.label_column)
        classes = train.features[config.label_column]
        unknown = set(map(str, test.unique(config.label_column))) - set(classes.names)
        if unknown:
            raise ValueError(f"the test data has classes that the training data lacks: {', '.join(sorted(unknown))}")
        # Through strings, which is how class_encode_column names classes: an integer would be taken for a position.
        test = test.cast_column(config.label_column, Value("string")).cast_column(config.label_column, classes)
    train, test = _subset(train, config.max_train_examples), _subset(test, config.max_test_examples)
    labels = np.array(train[config.label_column])
    num_labels = train.features[config.label_column].num_classes
    encode = _text_encoder(config) if config.task == "text-classification" else _image_encoder(config)
    auto = AutoModelForSequenceClassification if config.task == "text-classification" else AutoModelForImageClassification
    # A model pretrained for other classes keeps its body and gets a new head.
    torch.manual_seed(0)
    model = auto.from_pretrained(config.model, num_labels=num_labels, ignore_mismatched_sizes=True)
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
    builder, options = _LOADERS[Path(path).suffix.lower()]
    return load_dataset(builder, data_files=path, split="train", **options)


def _subset(dataset: Dataset, size: int | None) -> Dataset:
    return dataset if size is None or size >= len(dataset) else dataset.shuffle(seed=0).select(range(size))


def _pixels(rows: dict[str, list]) -> Tensor:
    return torch.tensor(rows["pixel_values"])


def _text_encoder(config: SimulationConfig) -> Callable[[dict[str, list]], dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    options = {"truncation": True, "max_length": config.max_length, "padding": True, "return_tensors": "pt"}

    def encode(rows: dict[str, list]) -> dict[str, Tensor]:
        pair = rows[config.text_pair_column] if config.text_pair_column else None
        return dict(tokenizer(rows[config.text_column], pair, **options))

    return encode


def _image_encoder(config: SimulationConfig) -> Callable[[dict[str, list]], dict[str, Tensor]]:
    processor = AutoImageProcessor.from_pretrained(config.model)
    return lambda rows: dict(processor([image.convert("RGB") for image in rows[config.image_column]], return_tensors="pt"))
