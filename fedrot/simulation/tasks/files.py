"""Reading examples from local files, cell by cell as they are written."""

import csv
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from .columns import is_list

# Cells are taken literally: a quotation mark in a TSV is a character like others, and the word NA is a text.
_DELIMITED: dict[str, dict[str, Any]] = {
    ".csv": {"keep_default_na": False},
    ".tsv": {"keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE},
}
KINDS = (*_DELIMITED, ".json", ".jsonl")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")

# An integer that is written back as it stands, in 64 bits: 01 is none.
_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
_NUMBER = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
_FRACTION = r"[.eE]"
_TRUTHS = (("true", "false"), ("True", "False"), ("TRUE", "FALSE"))


def names_file(dataset: str) -> bool:
    """Whether the name of a dataset is that of a local file, there or not, and not one on the hub or a folder."""
    path = Path(dataset)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    known = bool(suffixes) and (suffixes[-1] in KINDS or (suffixes[-1] in _COMPRESSED and suffixes[-2:-1] != []))
    return path.is_file() or known or (path.is_absolute() and not path.exists())


def load_file(path: str, literal: Collection[str] = ()) -> Dataset:
    """Load a CSV, TSV, JSON or JSONL file.

    A column of a CSV or TSV holds numbers or truth values only if every cell is one, and integers only if every cell is
    written as Python writes it. Everything else is text: the labels 01 and 1 are two.

    Args:
        path: the file.
        literal: columns whose cells are trained on as they are written: text, whatever they look like.

    Raises:
        ValueError: a file that is missing, of no known kind or unreadable, or one without rows.
    """
    kind = _check_kind(Path(path))
    data = _load_delimited(path, _DELIMITED[kind]) if kind in _DELIMITED else _load("json", path)
    if not len(data):
        raise ValueError(f"{path} has 0 rows" + (" below its header" if kind in _DELIMITED else ""))
    if kind in _DELIMITED:
        for column in set(data.column_names) - set(literal):
            if dtype := _type_of(_arrow(data, column)):
                data = data.cast_column(column, Value(dtype))
    else:
        _check_rows(data, path)
        for column in set(data.column_names) & set(literal):
            _check_as_written(data, column, path)
    return data


def _check_kind(path: Path) -> str:
    """Return the suffix of a readable file."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    kind = path.suffix.lower()
    if kind in _COMPRESSED:
        raise ValueError(f"{path} is compressed; unpack it and name the {', '.join(KINDS)} file in it")
    if kind not in KINDS:
        raise ValueError(f"{path} is of no known kind; use {', '.join(KINDS)}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: it has 0 bytes")
    return kind


def _load(builder: str, path: str, **options: Any) -> Dataset:
    try:
        return load_dataset(builder, data_files=path, split="train", **options)
    except DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read as {builder}: {error.__cause__ or error}") from error
    except (StopIteration, ValueError) as error:  # how datasets says that a file has no rows
        if isinstance(error, ValueError) and "no data" not in str(error):
            raise
        return Dataset.from_dict({})


def _load_delimited(path: str, options: dict[str, Any]) -> Dataset:
    """Load every cell as text."""
    try:
        first = pd.read_csv(path, nrows=1, dtype=str, **options)
    except (ValueError, pd.errors.ParserError) as error:  # a UnicodeDecodeError too
        raise ValueError(f"{path} cannot be read as csv: {error}") from error
    if not isinstance(first.index, pd.RangeIndex):  # pandas takes the first cell for a name and shifts the others
        raise ValueError(
            f"the first row of {path} has more cells than its header, which has {len(first.columns)}; "
            "put texts that hold the separator into quotation marks"
        )
    return _load("csv", path, features=Features({str(column): Value("string") for column in first.columns}), **options)


def _arrow(data: Dataset, column: str) -> pa.ChunkedArray:
    return data.select_columns(column).with_format("arrow")[:].column(0)


def _type_of(cells: pa.ChunkedArray) -> str | None:
    """Name the type that all cells of a column of text have, or None if they are text."""
    if pc.all(pc.match_substring_regex(cells, _INTEGER)).as_py():
        return "int64"
    found = {str(x) for x in pc.unique(cells).slice(0, 3).to_pylist()}
    if any(found <= set(truths) for truths in _TRUTHS):
        return "bool"
    numbers = pc.all(pc.match_substring_regex(cells, _NUMBER)).as_py()
    return "float64" if numbers and pc.any(pc.match_substring_regex(cells, _FRACTION)).as_py() else None


def _check_rows(data: Dataset, path: str) -> None:
    """Refuse a file that holds one object around the rows, which would be taken for a single row."""
    if len(data) > 1:
        return
    row = data[0]
    lists = {name: row[name] for name, feature in data.features.items() if is_list(feature) and not _is_chat(row[name])}
    around = [name for name, values in lists.items() if values and isinstance(values[0], Mapping)]
    if around:
        count = len(lists[around[0]])
        raise ValueError(
            f"{path} holds one object, not rows; its {around[0]!r} is a list of {count}: save that list alone, or one of "
            f"its objects a line, as with jq -c '.{around[0]}[]'"
        )
    if len(lists) == len(data.features):
        raise ValueError(
            f"{path} holds one object, not rows; its {', '.join(map(repr, lists))} are lists: save one object a row, each "
            "with a value a column"
        )


def _is_chat(values: Any) -> bool:
    return bool(values) and isinstance(values[0], Mapping) and "role" in values[0]


def _check_as_written(data: Dataset, column: str, path: str) -> None:
    """Refuse a column of JSON that a template would not fill in as it is written."""
    dtype = str(getattr(data.features[column], "dtype", ""))
    if dtype.startswith(("timestamp", "date", "time")):
        raise ValueError(
            f"column {column} of {path} holds dates, which are read as points in time and would be trained on in another "
            "form; save the rows as CSV, whose cells are taken literally"
        )
    if dtype.startswith(("float", "double")):
        numbers = _arrow(data, column)
        if whole := pc.sum(pc.equal(pc.floor(numbers), numbers)).as_py():
            raise ValueError(
                f"column {column} of {path} mixes fractions and {whole} whole numbers, such that 5 would be trained on as "
                "5.0; write its numbers in quotation marks"
            )
