"""A comparison's results as tables: mean ± standard deviation over seeds."""

from collections.abc import Sequence

import pandas as pd

from ..plots import SCORES, shown_score


def comparison_tables(rows: pd.DataFrame, varied: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Title → table of the score and of the relative aggregation error.

    With one varied field its values are the columns of two tables, after the last round. Otherwise the columns are both
    measures after the first and the last evaluated round, and the rows all combinations.

    Args:
        rows: a row per run and round, with round, start, method, strength, seed, the measures, and the varied fields, which
            are missing where they play no part in a method.
        varied: the varied fields beside start, method, strength and seed.
    """
    score = shown_score(rows)
    measures = {score: SCORES[score], "relative_error": "relative error"}
    rows = with_labels(rows.dropna(subset=[score]), ["strength"])
    if len(varied) == 1:
        field = varied[0]
        rows = repeat_unvaried(rows, field)
        last = rows[rows["round"] == rows.groupby(["start", "method", field])["round"].transform("max")]
        return {
            f"{name} after the last round, by {field}": _means(last, measure, ["start", "method", field]).unstack(field)
            for measure, name in measures.items()
        }
    groups = ["start", "method", *varied]
    for field in varied:
        rows = repeat_unvaried(rows, field)
    rounds = rows.groupby(groups)["round"]
    columns = {}
    for measure, name in measures.items():
        for which, number in {"first": rounds.transform("min"), "last": rounds.transform("max")}.items():
            some = rows[rows["round"] == number]
            which = f"round {number.iloc[0] + 1}" if number.nunique() == 1 else f"{which} round"
            columns[f"{name}, {which}"] = _means(some, measure, groups)
    return {"": pd.DataFrame(columns)}


def rounds_tables(rows: pd.DataFrame, varied: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Title → table of the score and of the relative aggregation error by round: of rounds 1, 2, 3, 5, 10, 20, 30, 50, 100 …
    those that were evaluated, and the last.

    Args:
        rows, varied: as for ``comparison_tables``.
    """
    score = shown_score(rows)
    rows = with_labels(rows.dropna(subset=[score]), ["strength"])
    for field in varied:
        rows = repeat_unvaried(rows, field)
    rows = rows.assign(round=rows["round"] + 1)
    shown = {digit * 10**power for power in range(6) for digit in (1, 2, 3, 5)} | {rows["round"].max()}
    rows = rows[rows["round"].isin(shown)]
    groups = ["start", *varied, "method", "round"]
    measures = {score: SCORES[score], "relative_error": "relative error"}
    return {f"{name} by round": _means(rows, measure, groups).unstack("round") for measure, name in measures.items()}


def with_labels(rows: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """The rows, with the values of these fields in their method's name; of strength, where it plays a part."""
    for field in fields:
        if field == "strength":
            label = rows[field].map(lambda x: "" if pd.isna(x) else f" λ={x:g}")
        else:
            rows = repeat_unvaried(rows, field)
            label = rows[field].map(lambda x, field=field: f", {field} {x}")
        rows = rows.assign(method=rows["method"] + label)
    return rows


def repeat_unvaried(rows: pd.DataFrame, field: str) -> pd.DataFrame:
    """The rows, those of methods in which the field plays no part once for each of its values."""
    plays = rows[field].notna()
    values = rows.loc[plays, [field]].drop_duplicates()
    if plays.all() or values.empty:
        return rows
    repeated = rows[~plays].drop(columns=field).merge(values, how="cross")
    return pd.concat([repeated, rows[plays]], ignore_index=True)


def as_text(tables: dict[str, pd.DataFrame], notes: Sequence[str]) -> str:
    """For a terminal."""
    parts = [(f"{title}\n" if title else "") + table.to_string() for title, table in tables.items()]
    return "\n\n".join([*parts, *notes])


def as_markdown(tables: dict[str, pd.DataFrame], notes: Sequence[str]) -> str:
    """For a page, every row complete."""
    parts = []
    for title, table in tables.items():
        flat = table.reset_index()
        lines = [list(flat.columns), ["---"] * flat.shape[1], *flat.astype(str).to_numpy().tolist()]
        parts.append("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))
        if title:
            parts[-1] = f"{title}\n\n{parts[-1]}"
    return "\n\n".join([*parts, *notes])


def _means(rows: pd.DataFrame, measure: str, groups: list[str]) -> pd.Series:
    return rows.groupby(groups, sort=False)[measure].agg(_mean_deviation)


def _mean_deviation(values: pd.Series) -> str:
    return f"{values.mean():.3f}" if len(values) < 2 else f"{values.mean():.3f} ± {values.std():.3f}"
