"""The report on when methods leave the plateau, held to metrics whose answers are known."""

import math
import shutil

import numpy as np
import pandas as pd
import pytest

from benchmarks.plateau import report
from benchmarks.plateau_measures import evaluations_back, leaving_round, smoothed, summarize, t_interval
from benchmarks.plateau_plot import plot_plateau
from benchmarks.plateau_runs import read_runs
from fedrot.simulation.metrics import write_metrics
from fedrot.simulation.sweep.compare import _read_rows, save_comparison
from fedrot.simulation.sweep.comparison import Comparison

T = 4.302652729911275  # the 0.975 quantile of Student's t with two degrees of freedom
ROUNDS, SEEDS = 20, (11, 12, 13)
LEFT = {"fedit": (10, 12, 17), "fedrot": (9, 12, 14), "ffa-lora": (19, 18, None), "O": (None, None, None)}
SCALE = {"fedit": 1.0, "fedrot": 2.0, "ffa-lora": 0.0, "O": 4.0}
COMPARISON = {
    "methods": ["fedit", "fedrot", "ffa-lora"],
    "strengths": [0.5],
    "starts": ["shared"],
    "seeds": SEEDS,
    "variants": {"O": {"reflections": True, "strength": 1.0}},
}
SMALL = {"fields": {"rounds": ROUNDS, "clients": 10}}


def accuracies(left, best=0.9):
    """0.5 before the round of leaving, then the best."""
    return [best if left is not None and r >= left else 0.5 for r in range(1, ROUNDS + 1)]


def write_run(folder, run, accuracy):
    method, seed = run.columns["method"], run.config.seed
    rows = [
        {"round": r, "method": run.config.method, "clients": [0], "dropped": {}, "accuracy": a, "loss": 1.0,
         "relative_error": 0.01 * r * (seed - 10) * SCALE[method], "norm_B": r * SCALE[method] if SCALE[method] else None}
        for r, a in enumerate(accuracy, 1)
    ]  # fmt: skip
    write_metrics(folder / run.name / "metrics.jsonl", rows)


def write_comparison(folder, **changed):
    """A comparison's folder whose runs leave as in LEFT, and its runs."""
    comparison = Comparison(**COMPARISON | SMALL | changed)
    folder.mkdir(parents=True)
    save_comparison(comparison, folder / "config.yaml")
    runs, _ = comparison.runs()
    for run in runs:
        best = 0.7 if run.config.dtype == "float16" else 0.9
        write_run(folder, run, accuracies(LEFT[run.columns["method"]][SEEDS.index(run.config.seed)], best))
    return runs


@pytest.fixture
def folder(tmp_path):
    write_comparison(tmp_path / "sst2")
    return tmp_path / "sst2"


def row_of(summary, method, **place):
    for name, value in {"method": method, **place}.items():
        summary = summary[summary[name] == value]
    (row,) = summary.to_dict("records")
    return row


def test_the_median_of_five_is_centred_and_ignores_two_evaluations():
    accuracy = pd.Series([0.5, 0.9, 0.9, 0.5, 0.5, 0.5, 0.8, 0.9, 0.1, 0.9], range(1, 11))
    assert smoothed(accuracy).to_list() == pytest.approx([0.9, 0.7, 0.5, 0.5, 0.5, 0.5, 0.5, 0.8, 0.85, 0.9])
    assert leaving_round(accuracy.iloc[2:], 0.75) == 8
    assert leaving_round(accuracy.iloc[3:7], 0.75) is None
    assert leaving_round(pd.Series(accuracies(10), range(1, ROUNDS + 1)), 0.7) == 10
    assert leaving_round(pd.Series([0.5, 0.5, 0.5, 0.9, 0.9, 0.9], [5, 10, 15, 20, 25, 30]), 0.7) == 20, "rounds"


def test_falling_back_is_counted_and_does_not_move_the_round():
    back = pd.Series([0.5, 0.5, 0.5, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.9], range(1, 11))
    assert leaving_round(back, 0.7) == 4
    assert evaluations_back(back, 0.7) == 3 and evaluations_back(back, 0.95) == 0


def test_intervals_are_students():
    found = t_interval([10, 12, 17])
    half = T * math.sqrt((9 + 1 + 16) / 2 / 3)
    assert (found.mean, found.low, found.high) == pytest.approx((13, 13 - half, 13 + half))
    assert half == pytest.approx(8.9567, abs=1e-4)
    assert t_interval([7]).mean == 7 and math.isnan(t_interval([7]).low) and math.isnan(t_interval([]).mean)


def test_a_setting_is_measured_over_seeds_and_against_fedit_of_the_same_seed(folder):
    runs, counts = read_runs([folder])
    assert counts == {folder: (12, 12)}
    summary = summarize(runs)
    fedit, fedrot, ffa, never = (row_of(summary, method) for method in ("fedit", "fedrot λ=0.5", "ffa-lora", "O"))
    assert (fedit["task"], fedit["dtype"], fedit["clients"], fedit["seeds"]) == ("sst2", "float32", 10, 3)
    assert (fedit["chance"], fedit["best_of_fedit"], fedit["threshold"]) == pytest.approx((0.5, 0.9, 0.7))
    assert (fedit["left_mean"], fedit["left_low"], fedit["left_high"]) == pytest.approx((13, 4.0433, 21.9567), abs=1e-4)
    assert (fedit["never"], fedit["left_by_seed"], fedit["minus_fedit_by_seed"]) == (0, "10, 12, 17", "")
    half = T * math.sqrt(((1 / 3) ** 2 + (4 / 3) ** 2 + (5 / 3) ** 2) / 2 / 3)
    assert fedrot["minus_fedit_by_seed"] == "-1, +0, -3"
    assert [fedrot[f"minus_fedit_{x}"] for x in ("mean", "low", "high")] == pytest.approx(
        [-4 / 3, -4 / 3 - half, -4 / 3 + half]
    )
    # Every run climbs from 0.5 to 0.9 at once, so that every threshold is reached in the same round.
    assert fedrot["minus_fedit_over_mean"] == pytest.approx(-4 / 3) and math.isnan(ffa["minus_fedit_over_mean"])
    assert math.isnan(ffa["left_mean"]) and ffa["left_at_least"] == pytest.approx((19 + 18 + 20) / 3)
    assert (ffa["left_by_seed"], ffa["minus_fedit_by_seed"]) == ("19, 18, > 20", "+9, +6, > +3")
    assert math.isnan(ffa["minus_fedit_mean"]) and math.isnan(ffa["minus_fedit_low"])
    assert (never["never"], never["left_by_seed"], never["left_at_least"]) == (3, "> 20, > 20, > 20", 20)

    last = [0.9, 0.9, 0.5]
    assert (ffa["last_mean"], ffa["last_std"]) == pytest.approx((np.mean(last), np.std(last, ddof=1)))
    assert (never["best_mean"], never["best_std"]) == pytest.approx((0.5, 0))
    assert (fedrot["relative_error_5_mean"], fedrot["relative_error_5_std"]) == pytest.approx((0.2, 0.1))
    assert (fedrot["relative_error_5_ratio_mean"], fedrot["relative_error_5_ratio_std"]) == pytest.approx((2, 0))
    assert (never["norm_B_20_mean"], never["norm_B_20_ratio_mean"]) == pytest.approx((80, 4))
    assert ffa["relative_error_2_ratio_mean"] == 0 and math.isnan(ffa["norm_B_2_mean"])
    assert math.isnan(fedit["norm_B_2_ratio_mean"]) and "norm_B_50_mean" not in summary


def test_fedit_that_never_leaves_bounds_the_difference_from_above(tmp_path):
    for run in write_comparison(tmp_path / "c"):
        left = {"fedit": (None, None, 5), "fedrot": (8, None, 5)}.get(run.columns["method"], (None,) * 3)
        write_run(tmp_path / "c", run, accuracies(left[SEEDS.index(run.config.seed)]))
    summary = summarize(read_runs([tmp_path / "c"])[0])
    assert row_of(summary, "fedrot λ=0.5")["minus_fedit_by_seed"] == "< -12, ?, +0"
    assert row_of(summary, "O")["minus_fedit_by_seed"] == "?, ?, > +15"


def test_places_and_tasks_have_thresholds_of_their_own(tmp_path):
    varied = {"dtype": ["float32", "float16"], "clients": [10, 50]}
    write_comparison(tmp_path / "a", vary=varied, fields={"rounds": ROUNDS})
    write_comparison(tmp_path / "b", fields={"rounds": ROUNDS, "clients": 10, "max_test_examples": 30})
    runs, counts = read_runs([tmp_path / "a", tmp_path / "b"])
    assert list(counts.values()) == [(48, 48), (12, 12)]
    summary = summarize(runs)
    assert {(x["task"], x["dtype"], x["clients"]) for x in summary.to_dict("records")} == {
        *(("a", dtype, n) for dtype in ("float32", "float16") for n in (10, 50)),
        ("b", "float32", 10),
    }
    assert row_of(summary, "fedit", task="a", dtype="float16", clients=50)["threshold"] == pytest.approx(0.6)
    assert row_of(summary, "fedit", task="b")["threshold"] == pytest.approx(0.7)
    given = summarize(runs, chance=0.3)
    assert set(given["chance"]) == {0.3} and row_of(given, "O", task="b")["threshold"] == pytest.approx(0.6)


def test_fedit_has_the_same_varied_values_where_it_has_them(tmp_path):
    varied = {"lr": [0.1, 0.2], "align_on": ["A", "joint"]}  # in FedIT nothing is aligned
    for run in write_comparison(tmp_path / "c", vary=varied, seeds=[11], variants={}):
        if run.config.lr == 0.2:
            write_run(tmp_path / "c", run, accuracies({"fedit": 5, "fedrot": 7}.get(run.config.method)))
    summary = summarize(read_runs([tmp_path / "c"])[0])
    for align_on in ("A", "joint"):
        for lr, difference in ((0.1, "-1"), (0.2, "+2")):
            row = row_of(summary, f"fedrot λ=0.5, lr {lr}, align_on {align_on}")
            assert row["minus_fedit_by_seed"] == difference


def test_chance_is_the_median_of_the_first_three_evaluations(folder):
    runs, _ = read_runs([folder])
    for run in runs:
        run.rows.loc[:2, "accuracy"] = [0.4, 0.6, 0.55]
        run.rows.loc[3:, "accuracy"] = 0.9
    runs[0].rows.loc[0, "accuracy"] = np.nan  # not evaluated: the fourth is among its first three
    assert set(summarize(runs)["chance"]) == {0.55}


def test_unfinished_runs_do_not_count(folder):
    runs, _ = Comparison(**COMPARISON | SMALL).runs()
    write_run(folder, runs[0], accuracies(3)[:-1])
    shutil.rmtree(folder / runs[1].name)
    found, counts = read_runs([folder])
    assert counts == {folder: (10, 12)}
    assert {(run.setting.method, run.config.seed) for run in found if run.method == "fedit"} == {("fedit", 13)}
    row = row_of(summarize(found), "fedrot λ=0.5")
    assert (row["left_by_seed"], row["minus_fedit_by_seed"], row["minus_fedit_mean"]) == ("9, 12, 14", "–, –, -3", -3)


def test_a_better_run_of_another_method_moves_no_threshold(folder):
    runs, _ = read_runs([folder])
    before = summarize(runs)
    for run in runs:
        if run.method == "O":
            run.rows.loc[10:, "accuracy"], run.rows.loc[:2, "accuracy"] = 0.99, 0.1
    after = summarize(runs)
    assert list(after["threshold"]) == list(before["threshold"]) and set(after["chance"]) == set(before["chance"])


def test_a_setting_without_all_seeds_is_named_and_left_out(folder, tmp_path):
    for run in Comparison(**COMPARISON | SMALL).runs()[0]:
        if run.columns["method"] == "ffa-lora" and run.config.seed == 12:
            shutil.rmtree(folder / run.name)
    report([folder], tmp_path / "out")
    text = (tmp_path / "out/plateau.md").read_text()
    assert "sst2, float32, 10, ffa-lora: 2 of 3 seeds" in text and "| ffa-lora |" not in text
    assert "ffa-lora" not in set(pd.read_csv(tmp_path / "out/plateau.csv")["method"])


def test_results_stand_for_folders_of_runs_that_are_gone(folder, tmp_path):
    varied = {"clients": [3, 10], "align_on": ["A", "joint"]}
    runs = write_comparison(tmp_path / "varied", vary=varied, fields={"rounds": ROUNDS})
    before = summarize(read_runs([tmp_path / "varied"])[0])
    assert row_of(before, "fedrot λ=0.5, align_on joint", clients=3)["minus_fedit_by_seed"] == "-1, +0, -3"
    _read_rows(runs, tmp_path / "varied").to_csv(tmp_path / "varied/results.csv", index=False)
    for run in runs:
        shutil.rmtree(tmp_path / "varied" / run.name)
    after, counts = read_runs([tmp_path / "varied"])
    assert counts == {tmp_path / "varied": (len(runs), len(runs))} and len(runs) == 36
    pd.testing.assert_frame_equal(summarize(after), before, check_dtype=False)


def test_runs_that_do_not_go_together_are_refused(folder, tmp_path):
    write_comparison(tmp_path / "again")
    with pytest.raises(ValueError, match=r"again and .*sst2 both have fedit with seed 11"):
        read_runs([folder, tmp_path / "again"])
    for run in write_comparison(tmp_path / "other", fields={**SMALL["fields"], "lr": 0.5}):
        if run.config.seed == 11:
            shutil.rmtree(tmp_path / "other" / run.name)
    for run in Comparison(**COMPARISON | SMALL).runs()[0]:
        if run.config.seed != 11:
            shutil.rmtree(folder / run.name)
    with pytest.raises(ValueError, match="run fedit with another lr: report them apart"):
        read_runs([folder, tmp_path / "other"])


@pytest.mark.drawn
def test_the_report_is_tables_and_a_plot(folder, tmp_path, capsys):
    report([folder], tmp_path / "out")
    assert capsys.readouterr().out == f"{folder}: 12 of 12 runs are finished\n"
    text = (tmp_path / "out/plateau.md").read_text()
    assert f"- {folder}: 12 of 12 runs are finished\n" in text
    for line in (
        "| sst2 | float32 | 10 | fedit | 0.700 | 13.0 [4.0, 22.0] | 10, 12, 17 | 0, 0, 0 | – | – | – | "
        "0.900 ± 0.000 | 0.900 ± 0.000 |",
        "| sst2 | float32 | 10 | fedrot λ=0.5 | 0.700 | 11.7 [5.4, 17.9] | 9, 12, 14 | 0, 0, 0 | "
        "-1.3 [-5.1, +2.5] | -1.3 [-5.1, +2.5] | -1, +0, -3 | 0.900 ± 0.000 | 0.900 ± 0.000 |",
        "| sst2 | float32 | 10 | ffa-lora | 0.700 | > 19.0, 1 of 3 seeds never; no interval | 19, 18, > 20 | 0, 0, 0 | "
        "not every run leaves; no interval | – | +9, +6, > +3 | 0.767 ± 0.231 | 0.767 ± 0.231 |",
        "| sst2 | float32 | 10 | fedrot λ=0.5 | 0.08 ± 0.04 (× 2.00 ± 0.00) | 0.2 ± 0.1 (× 2.00 ± 0.00) | "
        "0.4 ± 0.2 (× 2.00 ± 0.00) | 0.8 ± 0.4 (× 2.00 ± 0.00) |",
        "| task | dtype | clients | method | round 2 | round 5 | round 10 | round 20 |",
        "| sst2 | float32 | 10 | ffa-lora | – | – | – | – |",
    ):
        assert line in text.splitlines()
    assert "| O | 0.700 | > 20 | > 20, > 20, > 20 |" in text
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "out/plateau.csv", keep_default_na=False, na_values=[""]).fillna({"minus_fedit_by_seed": ""}),
        summarize(read_runs([folder])[0]),
        check_dtype=False,
    )
    assert (tmp_path / "out/plateau.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(folder)
    write_comparison(folder)
    for path in folder.glob("*/metrics.jsonl"):
        path.unlink()
    with pytest.raises(ValueError, match="no run is finished"):
        report([folder], tmp_path / "out")


def test_marks_are_where_methods_leave_and_thin_lines_are_seeds(tmp_path):
    write_comparison(tmp_path / "c", vary={"dtype": ["float32", "float16"]})
    runs, _ = read_runs([tmp_path / "c"])
    figure = plot_plateau(runs, summarize(runs), tmp_path / "plateau.png")
    axes = np.reshape(figure.axes, (3, 2))
    assert [axis.get_title() for axis in axes[0]] == ["10 clients, float32", "10 clients, float16"]
    for axis, threshold in zip(axes[0], (0.7, 0.6), strict=True):
        marks = [line for line in axis.lines if len(line.get_xdata()) == 1]
        places = [[line.get_xdata()[0], line.get_ydata()[0]] for line in marks]
        np.testing.assert_allclose(places, [[13, threshold], [35 / 3, threshold]])
        assert axis.lines[0].get_color() == marks[0].get_color() != marks[1].get_color()
        assert len([line for line in axis.lines if line.get_linewidth() == 0.5]) == 12
    handles, labels = axes[0, 0].get_legend_handles_labels()
    assert labels == ["fedit", "fedrot λ=0.5", "ffa-lora", "O"]
    means = np.mean([accuracies(left) for left in LEFT["fedrot"]], axis=0)
    np.testing.assert_allclose(handles[1].get_data(), [range(1, ROUNDS + 1), means])
    assert axes[1, 0].get_legend_handles_labels()[1] == ["fedit", "fedrot λ=0.5", "O"]
    assert axes[2, 0].get_legend_handles_labels()[1] == ["fedit", "fedrot λ=0.5", "O"], "rounding is not drawn"
