"""Loading examples from the hub or from local files, and checking their columns."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..config import SimulationConfig

GLUE, GLUE_TASKS = "nyu-mll/glue", ("sst2", "qnli", "qqp", "rte", "mnli")

# Cells are taken literally: a quotation mark in a TSV is a character like others, and the word NA is a text.
_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}


def load_datasets(config: SimulationConfig) -> tuple[Dataset, Dataset]:
    """Load training and test examples as configured.

    Raises:
        ValueError: a file or a split that is missing, or a file of another kind.
    """
    if Path(config.dataset).suffix.lower() not in _LOADERS:
        name, subset, test_split = hub_name(config)
        if config.test_dataset is not None:
            return _load_split(name, subset, config.train_split), _load_test(config)
        return _load_split(name, subset, config.train_split), _load_split(name, subset, test_split)
    train = _load_file(config.dataset)
    if config.test_dataset is not None:
        return train, _load_test(config)
    halves = train.train_test_split(test_size=config.test_fraction, seed=0)
    return halves["train"], halves["test"]


def hub_name(config: SimulationConfig) -> tuple[str, str | None, str]:
    """Name the dataset, its configuration and its test split on the hub, where GLUE's tasks are configurations."""
    name, subset, test_split = config.dataset, config.dataset_config, config.test_split
    if not Path(name).exists():
        if name in GLUE_TASKS:
            name, subset = GLUE, name
        elif name == "glue":
            name = GLUE
    if name == GLUE and subset == "mnli" and test_split == "validation":
        test_split = "validation_matched"
    return name, subset, test_split


def _load_split(name: str, subset: str | None, split: str) -> Dataset:
    loaded = load_dataset(name, subset)
    if split not in loaded:
        raise ValueError(f"{name} has no split {split!r}; its splits are {', '.join(loaded)}")
    return loaded[split]


def _load_test(config: SimulationConfig) -> Dataset:
    assert config.test_dataset is not None
    if Path(config.test_dataset).suffix.lower() in _LOADERS or Path(config.test_dataset).is_file():
        return _load_file(config.test_dataset)
    return _load_split(config.test_dataset, None, config.test_split)


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


def check_column(data: Dataset, column: str, name: str, *, text: bool = False) -> None:
    """Refuse a column that is missing or has gaps or, if it must be ``text``, holds something else."""
    if column not in data.column_names:
        raise ValueError(f"{name} has no column {column!r}; its columns are {', '.join(data.column_names)}")
    # Arrow counts at once. Row by row, a large dataset would take minutes, and images would be decoded.
    if empty := data.select_columns(column).with_format("arrow")[:].column(0).null_count:
        raise ValueError(f"{empty} of {len(data)} rows of {name} have nothing in column {column!r}; leave them out")
    if text and "string" not in str(data.features[column].dtype):
        raise ValueError(f"column {column} holds {data.features[column].dtype}, not text")


def check_classes(data: Dataset, column: str) -> None:
    """Refuse a column of floating-point numbers, which are no classes."""
    if "float" in str(data.features[column].dtype):
        raise ValueError(f"column {column} holds floating-point numbers, not classes")


def encode_classes(train: Dataset, test: Dataset, column: str) -> tuple[Dataset, Dataset]:
    """Encode the column's values in both datasets as class numbers; the classes are those of the training examples.

    Raises:
        ValueError: floating-point numbers, a test class that is no training class, or rows whose class is withheld.
    """
    check_classes(train, column)
    if not isinstance(train.features[column], ClassLabel):
        train = train.class_encode_column(column)
        classes = train.features[column]
        unknown = set(map(str, test.unique(column))) - set(classes.names)
        if unknown:
            some = ", ".join(sorted(unknown)[:3])
            raise ValueError(
                f"the test data has {len(unknown)} classes that the training data lacks, such as: {some:.200}; "
                f"is {column} the column of the class?"
            )
        # class_encode_column names classes by strings. An integer would be taken for a class number here.
        test = test.cast_column(column, Value("string")).cast_column(column, classes)
    for name, data in (("the training data", train), ("the test data", test)):
        if withheld := int(np.sum(np.array(data[column]) < 0)):
            raise ValueError(f"the class of {withheld} of {len(data)} rows of {name} is withheld; use another split")
    return train, test


def class_numbers(train: Dataset, column: str | None) -> tuple[np.ndarray | None, list[str]]:
    """Return the class of every row (n,) and the classes' names, for classes that only serve to share examples out."""
    if column is None:
        return None, []
    check_column(train, column, "the training data")
    check_classes(train, column)
    if isinstance(train.features[column], ClassLabel):
        return np.array(train[column]), list(train.features[column].names)
    names, labels = np.unique([str(x) for x in train[column]], return_inverse=True)
    return labels, names.tolist()


def draw_subset(dataset: Dataset, size: int | None) -> Dataset:
    """Draw this many rows at random; all if ``size`` is None or not smaller than the dataset."""
    return dataset if size is None or size >= len(dataset) else dataset.shuffle(seed=0).select(range(size))
