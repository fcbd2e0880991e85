"""Classification of texts, of pairs of texts and of images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from ..config import SimulationConfig
from .base import Task, at_least_float32
from .columns import check_column, check_images, check_names
from .data import draw_subset, encode_classes, load_datasets
from .fits import Batches, check_lengths, check_vocabulary
from .pretrained import check_model_folder, head_modules, keep_head_in_float32, load_pretrained

Encode = Callable[[dict[str, list[Any]]], dict[str, Tensor]]

# The columns of text of GLUE's tasks, and what most other datasets call theirs.
_TEXTS = (
    ("sentence",),
    ("question", "sentence"),
    ("question1", "question2"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
)
_TEXT = "text"


@dataclass
class ClassificationTask(Task):
    """A task whose examples have one class each.

    Attributes:
        encode: rows of either dataset → the model's inputs, without labels.
        label_column: the column of the class numbers.
    """

    encode: Encode
    label_column: str

    def collate(self, dataset: Dataset, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """See ``Task.collate``."""
        rows = dataset[indices.tolist()]
        inputs = {**self.encode(rows), "labels": torch.tensor(rows[self.label_column])}
        return {name: x.to(device) for name, x in inputs.items()}

    def losses(self, logits: Tensor, labels: Tensor, clients: int) -> Tensor:
        """See ``Task.losses``."""
        each = torch.nn.functional.cross_entropy(at_least_float32(logits), labels, reduction="none")
        return each.view(clients, -1).mean(1)

    @torch.no_grad()
    def evaluate(
        self, model: torch.nn.Module, batch_size: int, device: torch.device, rows: np.ndarray | None = None
    ) -> dict[str, float]:
        """Measure the accuracy and the mean cross-entropy."""
        was_training = model.training
        model.eval()
        rows = np.arange(len(self.test)) if rows is None else rows
        logits, labels = [], []
        for start in range(0, len(rows), batch_size):
            inputs = self.collate(self.test, rows[start : start + batch_size], device)
            labels.append(inputs.pop("labels").cpu())
            logits.append(model(**inputs).logits.float().cpu())
        model.train(was_training)
        scores, truth = torch.cat(logits), torch.cat(labels)
        return {
            "accuracy": float(accuracy_score(truth, scores.argmax(1))),
            "loss": torch.nn.functional.cross_entropy(scores, truth).item(),
        }


def load_text_classification(config: SimulationConfig) -> ClassificationTask:
    """Load texts or pairs of texts, with any sequence-classification model.

    Raises:
        ValueError: columns or classes that are missing, or no column that is known to hold the text.
    """
    check_model_folder(config.model)
    train, test = load_datasets(config)
    columns = text_columns(train, config)
    for name, data in (("the training data", train), ("the test data", test)):
        for column in columns:
            check_column(data, column, name, text=True)
    train, test, labels, classes, label_column = _with_classes(train, test, config)
    # Texts of similar length are evaluated together, which needs less padding.
    sizes = [sum(map(len, texts)) for texts in zip(*(test[column] for column in columns), strict=True)]
    test = test.select(np.argsort(sizes, kind="stable"))
    # A model pretrained for other classes keeps its body and gets a new head.
    model = load_pretrained(
        AutoModelForSequenceClassification, config, num_labels=len(classes), ignore_mismatched_sizes=True
    )
    keep_head_in_float32(model)
    tokenizer = _load_tokenizer(config, model)
    names = {"the training data": train, "the test data": test}
    check_lengths(model, config, {name: _tokens(data, tokenizer, columns, config) for name, data in names.items()})
    examples = {name: _tokens(data, tokenizer, columns, config) for name, data in names.items()}
    check_vocabulary(model, tokenizer, tokenizer.pad_token_id, config, examples)
    options = {"truncation": True, "max_length": config.max_length, "padding": True, "return_tensors": "pt"}

    def encode(rows: dict[str, list[Any]]) -> dict[str, Tensor]:
        return dict(tokenizer(*(rows[column] for column in columns), **options))

    # The task type makes PEFT train the head.
    return ClassificationTask(train, test, labels, classes, model, {"task_type": "SEQ_CLS"}, encode, label_column)


def load_image_classification(config: SimulationConfig) -> ClassificationTask:
    """Load images, with any image-classification model.

    Raises:
        ValueError: missing columns or classes.
    """
    check_model_folder(config.model)
    train, test = load_datasets(config)
    for name, data in (("the training data", train), ("the test data", test)):
        check_images(data, config.image_column, name)
    train, test, labels, classes, label_column = _with_classes(train, test, config)
    model = load_pretrained(AutoModelForImageClassification, config, num_labels=len(classes), ignore_mismatched_sizes=True)
    keep_head_in_float32(model)
    load_processor: Any = AutoImageProcessor.from_pretrained
    processor = load_processor(config.model)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Tensor]:
        inputs = processor([image.convert("RGB") for image in rows[config.image_column]], return_tensors="pt")
        return {name: x.to(model.dtype) for name, x in inputs.items()}

    defaults = {"modules_to_save": head_modules(model)}
    return ClassificationTask(train, test, labels, classes, model, defaults, encode, label_column)


def text_columns(data: Dataset, config: SimulationConfig) -> list[str]:
    """Find the column of the text, or the two of a pair: as configured, or those that a GLUE task has, or "text".

    Raises:
        ValueError: no column is configured, and the data has no "text" and the columns of no GLUE task, or of several.
    """
    if config.text_column is not None:
        return [config.text_column, *([config.text_pair_column] if config.text_pair_column else [])]
    found = [set(names) for names in _TEXTS if set(names) <= set(data.column_names)]
    found = [names for names in found if not any(names < other for other in found)]
    if not found and _TEXT in data.column_names:
        return [_TEXT]
    if len(found) != 1:
        number = "several known columns of text" if found else "no column of text that is known"
        raise ValueError(
            f"the training data has {number}; its columns are {', '.join(data.column_names)}; "
            "set text_column, and text_pair_column for a pair"
        )
    return next(list(names) for names in _TEXTS if set(names) == found[0])


def _with_classes(
    train: Dataset, test: Dataset, config: SimulationConfig
) -> tuple[Dataset, Dataset, np.ndarray, list[str], str]:
    column = config.label_column
    assert column is not None  # the configuration sets it for classification
    for name, data in (("the training data", train), ("the test data", test)):
        check_names(data, column, name)
    if config.partition_column is not None:
        check_names(train, config.partition_column, "the training data")
    train, test = encode_classes(train, test, column)
    train, test = draw_subset(train, config.max_train_examples), draw_subset(test, config.max_test_examples)
    return train, test, np.array(train[column]), list(train.features[column].names), column


def _load_tokenizer(config: SimulationConfig, model: PreTrainedModel) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    if tokenizer.pad_token is None:  # as language models have it; a classifier needs to know where a text ends
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _tokens(data: Dataset, tokenizer: Any, columns: list[str], config: SimulationConfig) -> Batches:
    """Yield the tokens of all texts, batch by batch."""
    for rows in data.iter(1000):
        yield tokenizer(*(rows[c] for c in columns), truncation=True, max_length=config.max_length)["input_ids"]
