"""A comparison's results as tables: mean ± standard deviation over seeds."""

from collections.abc import Sequence

import pandas as pd

from ..metrics import SCORES, shown_measures

_TITLES = {**SCORES, "relative_error": "relative error"}


def comparison_tables(rows: pd.DataFrame, varied: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Tabulate the score and, if it was measured, the relative aggregation error.

    With one varied field its values are the columns of a table per measure, after the last round. Otherwise the columns are
    the measures after the first and the last evaluated round, and the rows all combinations. If runs were
    evaluated more than once, a further table has the score in the best round of each run.

    Args:
        rows: a row per run and round, with round (from 1), start, method, strength, seed, the measures, and the varied
            fields, which are missing where they play no part in a method.
        varied: the varied fields beside start, method, strength and seed.

    Returns:
        Title → table.
    """
    rows, measures = _evaluated(rows)
    if len(varied) == 1:
        field = varied[0]
        rows = repeat_unvaried(rows, field)
        last = rows[rows["round"] == rows.groupby(["start", "method", field])["round"].transform("max")]
        groups = ["start", "method", field]
        tables = {}
        for measure in measures:
            means = _means(last, measure, groups)
            tables[f"{_TITLES[measure]} after the last round, by {field}"] = means.unstack(field, fill_value="–")
        best = _best_rounds(rows, measures[0], groups)
        return tables | {f"{title}, by {field}": means.unstack(field, fill_value="–") for title, means in best.items()}
    groups = ["start", "method", *varied]
    for field in varied:
        rows = repeat_unvaried(rows, field)
    rounds = rows.groupby(groups)["round"]
    columns = {}
    for measure in measures:
        for which, chosen in {"first": rounds.transform("min"), "last": rounds.transform("max")}.items():
            some = rows[rows["round"] == chosen]
            title = f"round {chosen.iloc[0]}" if chosen.nunique() == 1 else f"{which} round"
            columns[f"{_TITLES[measure]}, {title}"] = _means(some, measure, groups)
    best = _best_rounds(rows, measures[0], groups)
    return {"": pd.DataFrame(columns)} | {title: means.to_frame(_TITLES[measures[0]]) for title, means in best.items()}


def _best_rounds(rows: pd.DataFrame, score: str, groups: list[str]) -> dict[str, pd.Series]:
    """Take the best evaluated round of each run, by the score, and average over seeds; nothing if no run has two rounds.

    Returns:
        Title → means.
    """
    runs = rows.groupby([*groups, "seed"], sort=False)
    if runs["round"].nunique().max() < 2:
        return {}
    which, does = ("smallest", "underestimates") if score == "loss" else ("largest", "overestimates")
    scores = rows.assign(**{score: pd.to_numeric(rows[score])}).groupby([*groups, "seed"], sort=False)[score]
    best = (scores.min() if score == "loss" else scores.max()).reset_index()
    title = f"{_TITLES[score]} in each run's best round (the {which} of all rounds on the test data, which {does} it)"
    return {title: _means(best, score, groups)}


def rounds_tables(rows: pd.DataFrame, varied: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Tabulate the score and, if it was measured, the relative aggregation error by round.

    Columns are the rounds that were evaluated: all up to round 10, then 20, 30, 50, 100, 200, 300, 500 … and the last.

    Args:
        rows, varied: as for ``comparison_tables``.

    Returns:
        Title → table.
    """
    rows, measures = _evaluated(rows)
    for field in varied:
        rows = repeat_unvaried(rows, field)
    shown = {*range(1, 11), *(digit * 10**power for power in range(1, 6) for digit in (1, 2, 3, 5)), rows["round"].max()}
    rows = rows[rows["round"].isin(shown)]
    groups = ["start", *varied, "method", "round"]
    return {f"{_TITLES[measure]} by round": _means(rows, measure, groups).unstack("round") for measure in measures}


def _evaluated(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows whose round was evaluated, with λ in the methods' names, and the measures to show."""
    measures = shown_measures(rows)
    return with_labels(rows.dropna(subset=measures[:1]), ["strength"]), measures


def with_labels(rows: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """Write the values of these fields into the methods' names; strength only where it plays a part."""
    for field in fields:
        if field == "strength":
            label = rows[field].map(lambda x: "" if pd.isna(x) else f" λ={x:g}")
        else:
            rows = repeat_unvaried(rows, field)
            label = rows[field].map(lambda x, field=field: f", {field} {x}")
        rows = rows.assign(method=rows["method"] + label)
    return rows


def repeat_unvaried(rows: pd.DataFrame, field: str) -> pd.DataFrame:
    """Repeat the rows of methods in which the field plays no part, once for each of its values."""
    plays = rows[field].notna()
    values = rows.loc[plays, [field]].drop_duplicates()
    if plays.all() or values.empty:
        return rows
    repeated = rows[~plays].drop(columns=field).merge(values, how="cross")
    return pd.concat([repeated, rows[plays]], ignore_index=True)


def as_text(tables: dict[str, pd.DataFrame], notes: Sequence[str]) -> str:
    """Lay tables out for a terminal, the notes below them."""
    parts = [(f"{title}\n" if title else "") + table.to_string() for title, table in tables.items()]
    return "\n\n".join([*parts, *notes])


def as_markdown(tables: dict[str, pd.DataFrame], notes: Sequence[str]) -> str:
    """Lay tables out as Markdown, every row complete, the notes below them."""
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
    values = pd.to_numeric(values).dropna()
    if values.empty:
        return "–"
    return f"{values.mean():.3f}" if len(values) < 2 else f"{values.mean():.3f} ± {values.std():.3f}"
