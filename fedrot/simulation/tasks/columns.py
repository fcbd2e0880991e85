"""What the columns of a dataset hold, and refusing those that hold something else."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, Value


def is_list(feature: Any) -> bool:
    """Whether a column holds lists."""
    return isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence")


def _fields(feature: Any) -> set[str]:
    """The fields of the objects in a column's lists; none if it holds something else."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return set(inner) if is_list(feature) and isinstance(inner, Mapping) else set()


def is_of_messages(feature: Any) -> bool:
    """Whether a column holds chat messages: lists of objects with role and content."""
    return _fields(feature) >= {"role", "content"}


def may_hold_messages(feature: Any) -> bool:
    """Whether a column holds chat messages, or lists of objects that may be some: such as messages with unlike fields."""
    return is_of_messages(feature) or (is_list(feature) and type(getattr(feature, "feature", None)).__name__ == "Json")


def is_of_pairs(feature: Any) -> bool:
    """Whether a column holds chat messages under other names: lists of objects with from and value."""
    return _fields(feature) >= {"from", "value"}


def describe(feature: Any) -> str:
    """Say in words what a column holds."""
    if is_of_messages(feature):
        return "chat messages"
    if is_list(feature):
        inner = feature[0] if isinstance(feature, list) else feature.feature
        return f"lists of {describe(inner)}"
    if isinstance(feature, Mapping):
        return f"objects with {', '.join(feature)}"
    if type(feature).__name__ == "Json":  # what datasets makes of values that Arrow has no common type for
        return "values of more than one type"
    if isinstance(feature, ClassLabel):
        return "classes"
    if isinstance(feature, Value):
        return "text" if "string" in str(feature.dtype) else str(feature.dtype)
    return f"{type(feature).__name__} objects"


def check_column(data: Dataset, column: str, name: str, *, text: bool = False) -> None:
    """Refuse a column that is missing or has gaps, that holds no single values or, if it must be ``text``, no text."""
    if column not in data.column_names:
        raise ValueError(f"{name} has no column {column!r}; its columns are {', '.join(data.column_names)}")
    feature = data.features[column]
    if not isinstance(feature, Value | ClassLabel):
        wanted = "text" if text else "a single value a row"
        raise ValueError(f"column {column} of {name} holds {describe(feature)}, not {wanted}{_cure(feature)}")
    _check_gaps(data, column, name)
    if text and "string" not in str(feature.dtype):
        raise ValueError(f"column {column} holds {feature.dtype}, not text")


def _cure(feature: Any) -> str:
    if is_of_messages(feature):
        return "; causal-lm takes them, without templates"
    if is_of_pairs(feature):
        return "; to train causal-lm on them, name from role and value content, human user and gpt assistant"
    return "; write each value in quotation marks" if type(feature).__name__ == "Json" else ""


def check_messages(data: Dataset, column: str, name: str) -> None:
    """Refuse a column of messages that has gaps or whose contents are not all text."""
    _check_gaps(data, column, name)
    feature = data.features[column]
    inner = feature[0] if isinstance(feature, list) else feature.feature
    if isinstance(inner, Mapping) and describe(inner["content"]) != "text":
        raise ValueError(
            f"the content of the messages in column {column} of {name} holds {describe(inner['content'])}, not text"
        )


def check_images(data: Dataset, column: str, name: str) -> None:
    """Refuse a column that is missing or has gaps or holds no images."""
    if column in data.column_names and not isinstance(data.features[column], Image):
        raise ValueError(f"column {column} of {name} holds {describe(data.features[column])}, not images")
    if column not in data.column_names:
        raise ValueError(
            f"{name} has no column {column!r}; its columns are {', '.join(data.column_names)}; set image_column"
        )
    _check_gaps(data, column, name)


def check_names(data: Dataset, column: str, name: str) -> None:
    """Refuse a column that cannot name every row's class or client: as ``check_column``, and cells that are blank."""
    check_column(data, column, name)
    if "string" in str(data.features[column].dtype):
        blank = pc.sum(pc.equal(pc.utf8_trim_whitespace(_arrow(data, column)), "")).as_py()
        _refuse_gaps(blank or 0, data, column, name)


def _check_gaps(data: Dataset, column: str, name: str) -> None:
    _refuse_gaps(_arrow(data, column).null_count, data, column, name)


def _refuse_gaps(empty: int, data: Dataset, column: str, name: str) -> None:
    if empty:
        raise ValueError(f"{empty} of {len(data)} rows of {name} have nothing in column {column!r}; leave them out")


def _arrow(data: Dataset, column: str) -> pa.ChunkedArray:
    # Arrow counts at once. Row by row, a large dataset would take minutes, and images would be decoded.
    return data.select_columns(column).with_format("arrow")[:].column(0)
