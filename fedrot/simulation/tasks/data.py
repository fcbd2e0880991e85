"""Loading training and test examples from the hub or from local files, and numbering their classes."""

import logging
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Value, load_dataset

from ..config import SimulationConfig
from .columns import check_names
from .encoding import literal_columns
from .files import load_file, names_file

_log = logging.getLogger(__name__)

GLUE, GLUE_TASKS = "nyu-mll/glue", ("sst2", "qnli", "qqp", "rte", "mnli")


def load_datasets(config: SimulationConfig) -> tuple[Dataset, Dataset]:
    """Load training and test examples as configured.

    Raises:
        ValueError: a file or a split that is missing, or a file of another kind.
    """
    if not names_file(config.dataset):
        name, subset, test_split = hub_name(config)
        train = _load_split(name, subset, config.train_split)
        return train, _load_split(name, subset, test_split) if config.test_dataset is None else _load_test(config)
    train = load_file(config.dataset, _literal(config))
    return (train, _load_test(config)) if config.test_dataset is not None else _hold_out(train, config)


def _literal(config: SimulationConfig) -> list[str]:
    return [column for x in (config.prompt_template, config.response_template) if x for column in literal_columns(x)]


def _hold_out(data: Dataset, config: SimulationConfig) -> tuple[Dataset, Dataset]:
    """Divide the rows of a file into training and test rows."""
    fraction = config.test_fraction
    try:
        halves = data.train_test_split(test_size=fraction, seed=0)
    except ValueError as error:
        rows = f"{len(data)} row{'s' * (len(data) > 1)}"
        raise ValueError(
            f"{config.dataset} has {rows}, of which test_fraction {fraction:g} holds out all: add rows, make test_fraction "
            "smaller, or name a test_dataset"
        ) from error
    _log.info(
        "%d of %d rows of %s are held out for testing (test_fraction %g)",
        *(len(halves["test"]), len(data), config.dataset, fraction),
    )
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
    if names_file(config.test_dataset):
        return load_file(config.test_dataset, _literal(config))
    return _load_split(config.test_dataset, None, config.test_split)


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
        train, test = _as_text(train, column), _as_text(test, column)
        train = train.class_encode_column(column)
        classes = train.features[column]
        unknown = set(map(str, test.unique(column))) - set(classes.names)
        if unknown:
            some = ", ".join(sorted(unknown)[:3])
            raise ValueError(
                f"the test data has {len(unknown)} classes that the training data lacks, such as: {some:.200}; "
                f"is {column} the column of the class?"
            )
        test = test.cast_column(column, classes)
    for name, data in (("the training data", train), ("the test data", test)):
        if withheld := int(np.sum(np.array(data[column]) < 0)):
            raise ValueError(f"the class of {withheld} of {len(data)} rows of {name} is withheld; use another split")
    return train, test


def _as_text(data: Dataset, column: str) -> Dataset:
    """Write the classes as text. A number would be taken for a class number, and truth values are not encoded at all."""
    return data.cast_column(column, Value("string"))


def class_numbers(train: Dataset, column: str | None) -> tuple[np.ndarray | None, list[str]]:
    """Return the class of every row (n,) and the classes' names, for classes that only serve to share examples out."""
    if column is None:
        return None, []
    check_names(train, column, "the training data")
    check_classes(train, column)
    if isinstance(train.features[column], ClassLabel):
        return np.array(train[column]), list(train.features[column].names)
    names, labels = np.unique(_as_text(train, column)[column][:], return_inverse=True)
    return labels, names.tolist()


def draw_subset(dataset: Dataset, size: int | None) -> Dataset:
    """Draw this many rows at random; all if ``size`` is None or not smaller than the dataset."""
    return dataset if size is None or size >= len(dataset) else dataset.shuffle(seed=0).select(range(size))
