"""The tables of a comparison: means and deviations over seeds, of the last round and of each run's best."""

import numpy as np
import pandas as pd

from fedrot.simulation.sweep.tables import as_markdown, comparison_tables


def cell(values):
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def test_the_table_of_one_field_repeats_methods_in_which_it_plays_no_part():
    values = [("fedit", np.nan, None, 0.5, 0.3), ("fedrot", 1.0, "A", 0.6, 0.2), ("fedrot", 1.0, "B", 0.7, 0.1)]
    columns = ["method", "strength", "align_on", "accuracy", "relative_error", "seed", "round"]
    rows = pd.DataFrame([(*v, seed, r) for v in values for seed in (0, 1) for r in (1, 2)], columns=columns)
    rows = rows.assign(start="shared")
    rows.loc[rows["round"] == 1, ["accuracy", "relative_error"]] = 9.0  # of no account for the last round
    tables = comparison_tables(rows, ["align_on"])
    assert as_markdown(tables, ["a note"]) == (
        "accuracy after the last round, by align_on\n\n"
        "| start | method | A | B |\n| --- | --- | --- | --- |\n"
        "| shared | fedit | 0.500 ± 0.000 | 0.500 ± 0.000 |\n"
        "| shared | fedrot λ=1 | 0.600 ± 0.000 | 0.700 ± 0.000 |\n\n"
        "relative error after the last round, by align_on\n\n"
        "| start | method | A | B |\n| --- | --- | --- | --- |\n"
        "| shared | fedit | 0.300 ± 0.000 | 0.300 ± 0.000 |\n"
        "| shared | fedrot λ=1 | 0.200 ± 0.000 | 0.100 ± 0.000 |\n\n"
        "accuracy in each run's best round (the largest of all rounds on the test data, which overestimates it), by align_on"
        "\n\n| start | method | A | B |\n| --- | --- | --- | --- |\n"
        "| shared | fedit | 9.000 ± 0.000 | 9.000 ± 0.000 |\n"
        "| shared | fedrot λ=1 | 9.000 ± 0.000 | 9.000 ± 0.000 |\n\n"
        "a note"
    )


def test_several_fields_are_rows_and_rounds_that_were_not_evaluated_do_not_count():
    rows = pd.DataFrame(
        {"start": "shared", "method": "fedit", "strength": np.nan, "seed": 0, "clients": n, "lr": lr, "round": r,
         "loss": n * lr + r if r != 2 else np.nan, "relative_error": 0.0}
        for n in (3, 10) for lr in (0.5, 1.0) for r in (1, 2, 3)
    )  # fmt: skip
    table, best = comparison_tables(rows, ["clients", "lr"]).values()
    assert best.loc[("shared", "fedit", 10, 0.5)].to_list() == ["6.000"]  # the smallest loss is that of round 1
    assert list(table.columns) == [f"{m}, round {r}" for m in ("loss", "relative error") for r in (1, 3)]
    assert table.loc[("shared", "fedit", 10, 0.5)].to_list() == ["6.000", "8.000", "0.000", "0.000"]
    assert len(table) == 4


def test_the_best_round_is_each_runs_own():
    scores = {0: [0.1, 0.9, 0.4], 1: [0.2, 0.3, 0.7], 2: [0.5, np.nan, 0.1]}
    rows = pd.DataFrame(
        {"start": "shared", "method": method, "strength": np.nan, "seed": seed, "round": r, "accuracy": better + x,
         "loss": 9 - r, "relative_error": 0.0}
        for method, better in (("fedit", 0), ("own", 1)) for seed, some in scores.items() for r, x in enumerate(some, 1)
    )  # fmt: skip
    last, best = comparison_tables(rows, []).items()
    assert last[1].loc[("shared", "fedit"), "accuracy, round 3"] == cell([0.4, 0.7, 0.1])
    assert best[0].startswith("accuracy in each run's best round") and "test data, which overestimates it" in best[0]
    assert best[1]["accuracy"].to_list() == [cell([0.9, 0.7, 0.5]), cell([1.9, 1.7, 1.5])]
    (*_, (title, best)) = comparison_tables(rows.drop(columns="accuracy"), []).items()
    assert "the smallest of all rounds on the test data, which underestimates it" in title
    assert best["loss"].to_list() == [cell([6, 6, 6])] * 2
    assert len(comparison_tables(rows[rows["round"] == 3], [])) == 1, "one round is the last and the best"


def test_a_method_without_some_of_the_values_has_dashes():
    rows = pd.DataFrame(
        {"start": "shared", "method": method, "strength": np.nan, "seed": 0, "round": 1, "lr": lr, "accuracy": lr,
         "relative_error": 0.0}
        for method, rates in (("fedit", (0.5, 1.0)), ("rolora", (0.25, 0.5))) for lr in rates
    )  # fmt: skip
    accuracy, _ = comparison_tables(rows, ["lr"]).values()
    assert accuracy.loc[("shared", "fedit")].to_dict() == {0.25: "–", 0.5: "0.500", 1.0: "1.000"}
    assert accuracy.loc[("shared", "rolora")].to_dict() == {0.25: "0.250", 0.5: "0.500", 1.0: "–"}


def test_an_error_that_some_run_did_not_measure_is_a_dash():
    rows = pd.DataFrame(
        {
            "start": "shared",
            "method": method,
            "strength": np.nan,
            "seed": 0,
            "round": 1,
            "accuracy": 0.5,
            "relative_error": x,
        }
        for method, x in (("fedit", 0.25), ("fedrot", None))
    )
    (table,) = comparison_tables(rows, []).values()
    assert table["relative error, round 1"].to_list() == ["0.250", "–"]
