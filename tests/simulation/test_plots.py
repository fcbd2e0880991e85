"""What is drawn is the data: figures are asked for their lines, bars, limits and scales."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from fedrot.methods.registry import METHODS
from fedrot.simulation import SimulationConfig
from fedrot.simulation.metrics import shown_measures, shown_score
from fedrot.simulation.plots import plot_geometry, plot_run
from fedrot.simulation.sweep.plots import plot_comparison, plot_sweep

ROUNDS, SEEDS = 4, 3


@pytest.fixture
def png(tmp_path, request):
    """A path at which a plot is in the end, drawn if the test is of a kind of plot as a whole."""
    path = tmp_path / "plot.png"
    yield path
    assert path.read_bytes().startswith(b"\x89PNG" if request.node.get_closest_marker("drawn") else b"not drawn")


def rows(methods=("fedit", "fedrot"), starts=("shared", "independent"), **columns):
    rng, table = np.random.default_rng(0), []
    for start in starts:
        for method in methods:
            for seed in range(SEEDS):
                for r in range(1, ROUNDS + 1):
                    scores = {"accuracy": rng.random(), "loss": 3 * rng.random(), "relative_error": rng.random()}
                    table.append({"start": start, "method": method, "seed": seed, "round": r, **scores, **columns})
    return pd.DataFrame(table)


def lines(axis):
    """Label → (x, y) of the lines in the legend."""
    handles, labels = axis.get_legend_handles_labels()
    first = [getattr(handle, "lines", [handle])[0] for handle in handles]  # of error bars, the line between the points
    return {label: np.array(line.get_data(), float) for label, line in zip(labels, first, strict=True)}


def mean_by(table, x, measure, **chosen):
    for name, value in chosen.items():
        table = table[table[name] == value]
    values = table.groupby(x)[measure].mean()
    return np.array([values.index, values], float)


@pytest.mark.drawn
def test_the_comparison_draws_means_by_round_in_a_column_per_start(png):
    table = rows()
    figure = plot_comparison(table, png)
    axes = np.reshape(figure.axes, (2, 2))
    for axis_row, measure in zip(axes, ("accuracy", "relative_error"), strict=True):
        for axis, start in zip(axis_row, ("shared", "independent"), strict=True):
            drawn = lines(axis)
            assert list(drawn) == ["fedit", "fedrot"]
            for method, line in drawn.items():
                x, y = mean_by(table, "round", measure, start=start, method=method)
                np.testing.assert_allclose(line, [x, y])
    assert [axis.get_title() for axis in axes[0]] == ["shared start", "independent start"]
    assert axes[0, 0].get_ylim() == (0, 1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fedit", "fedrot"]


def test_more_than_three_starts_go_below_each_other(png):
    starts = [f"clients {n}, shared" for n in range(5)]
    table = rows(["fedit"], starts)
    table["relative_error"] *= table["start"].map(starts.index) + 1.0  # the last is the largest
    axes = np.reshape(plot_comparison(table, png).axes, (2, 2, 3))  # bands, score above error, columns
    for number, start in enumerate(starts):
        for axis, measure in zip(axes[number // 3, :, number % 3], ("accuracy", "relative_error"), strict=True):
            np.testing.assert_allclose(lines(axis)["fedit"][1], mean_by(table, "round", measure, start=start)[1])
            assert axis.get_ylim() == axes[0, 0 if measure == "accuracy" else 1, 0].get_ylim()
        assert axes[number // 3, 0, number % 3].get_title() == f"{start} start"
    assert axes[0, 1, 0].get_ylim()[1] >= table.groupby(["start", "round"])["relative_error"].mean().max()
    assert [axis.get_visible() for axis in axes[1].flat] == [True, True, False] * 2
    assert [axis.get_xlabel() for axis in axes[:, 1].flat] == ["", "", "round", "round", "round", ""]


def test_the_band_is_a_standard_deviation_over_seeds(png):
    table = rows(["fedit"], ["shared"])
    axis = plot_comparison(table, png).axes[0]
    corners = axis.collections[0].get_paths()[0].vertices
    values = table.groupby("round")["accuracy"].agg(["mean", "std"])
    assert values.index.tolist() == list(range(1, ROUNDS + 1))
    for r, (mean, std) in values.iterrows():
        heights = corners[corners[:, 0] == r][:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((mean - std, mean + std))


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (["loss", "pass_at_1", "exact_match", "accuracy"], "accuracy"),
        (["loss", "pass_at_1", "exact_match"], "exact_match"),
        (["loss", "pass_at_1"], "pass_at_1"),
        (["loss"], "loss"),
    ],
)
def test_the_first_score_that_has_values_is_shown(columns, shown, png):
    table = rows().drop(columns=["accuracy", "loss"]).assign(accuracy=np.nan)
    for name in columns:
        table[name] = np.linspace(1, 3, len(table))
    assert shown_score(table) == shown
    axis = plot_comparison(table, png).axes[0]
    np.testing.assert_allclose(lines(axis)["fedit"][1], mean_by(table, "round", shown, start="shared", method="fedit")[1])
    assert (axis.get_ylim() == (0, 1)) == (shown != "loss")


def test_rows_without_a_score_are_refused():
    with pytest.raises(ValueError, match="no round was evaluated"):
        shown_score(rows().drop(columns=["accuracy", "loss"]))


@pytest.mark.drawn
def test_a_run_shows_the_rounds_that_were_evaluated(png):
    metrics = [{"round": r, "method": "fedit", "relative_error": 0.1 * r} for r in range(1, 5)]
    metrics[1]["accuracy"], metrics[3]["accuracy"] = 0.5, 0.7
    above, below = plot_run(metrics, SimulationConfig(), png).axes
    np.testing.assert_allclose(lines(above)["fedit"], [[2, 4], [0.5, 0.7]])
    np.testing.assert_allclose(lines(below)["fedit"], [[1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4]])


@pytest.mark.drawn
def test_every_method_has_a_style_of_its_own(png):
    methods = [*METHODS, "fedrot λ=1", "random-rotation λ=1"]
    figure = plot_comparison(rows(methods, ["shared"]), png)
    styles = {(to_hex(line.get_color()), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(styles) == len({colour for colour, *_ in styles}) == len(methods)
    legend, box = figure.legends[0].get_window_extent(), figure.axes[-1].get_window_extent()
    assert legend.y1 < box.y0 and legend.x0 >= 0 and legend.x1 <= figure.bbox.width


@pytest.mark.parametrize(
    ("field", "values", "scale"),
    [
        ("lora.r", [2, 4, 8, 16, 24], "log"),
        ("lr", [0, 0.001, 0.01, 0.1], "symlog"),
        ("strength", [0, 0.2, 0.4, 0.6, 0.8, 1.0], "linear"),
        ("optimizer", ["sgd", "adamw"], "linear"),
        ("align_on", ["A", None], "linear"),
        ("gradient_checkpointing", [False, True], "linear"),
    ],
)
def test_a_sweep_shows_the_last_round_against_the_values(field, values, scale, png):
    table = pd.concat(
        [rows(starts=["shared"]).assign(**{field: v, "number": i}) for i, v in enumerate(values)], ignore_index=True
    )
    rng = np.random.default_rng(1)
    table["accuracy"], table["relative_error"] = rng.random(len(table)), rng.random(len(table))
    figure = plot_sweep(table, field, png)
    numbers = all(type(value) in (int, float) for value in values)
    places = values if numbers else range(len(values))
    named = [text.get_text() for text in figure.axes[-1].get_xticklabels()]
    assert named == [f"{value:g}" if numbers else str(value) for value in values]
    for axis, measure in zip(figure.axes, ("accuracy", "relative_error"), strict=True):
        assert axis.get_xscale() == scale
        assert axis.get_xticks().tolist() == list(places)
        assert axis.get_xlim()[0] < places[0] and places[-1] < axis.get_xlim()[1]
        for method, container in zip(("fedit", "fedrot"), axis.containers, strict=True):
            last = table[(table["method"] == method) & (table["round"] == ROUNDS)]
            seeds = [last.loc[last["number"] == i, measure] for i in range(len(values))]
            np.testing.assert_allclose(lines(axis)[method], [places, [of_value.mean() for of_value in seeds]])
            bars = container.lines[2][0].get_segments()
            np.testing.assert_allclose([np.ptp(bar[:, 1]) / 2 for bar in bars], [of_value.std() for of_value in seeds])


PARTS = ("removed_{}", "turn_per_distance_{}", "smallest_relative_distance_{}")
LARGEST = "turn_per_distance_{}_max"


def geometry_rows(**columns):
    table = rows(starts=["shared"])
    for i, name in enumerate([*PARTS, LARGEST], start=1):
        for factor in "AB":
            table[name.format(factor)] = np.linspace(1, 2, len(table)) * (i + (factor == "B"))
    table["error_bound"], table["aggregation_error"] = 2.0, np.linspace(0.5, 1, len(table))
    return table.assign(**columns)


@pytest.mark.drawn
def test_the_geometry_has_a_panel_for_every_part(png):
    table = geometry_rows()
    axes = np.reshape(plot_geometry(table, png).axes, (4, 2))
    for column, factor in enumerate("AB"):
        for axis, name in zip(axes[:-1, column], PARTS, strict=True):
            values = mean_by(table, "round", name.format(factor), method="fedit")[1]
            np.testing.assert_allclose(lines(axis)["fedit"][1], values)
        largest = axes[1, column].lines[1]
        assert largest.get_linewidth() < axes[1, column].lines[0].get_linewidth()
        values = mean_by(table, "round", LARGEST.format(factor), method="fedit")[1]
        np.testing.assert_allclose(largest.get_ydata(), values)
    error = mean_by(table, "round", "aggregation_error", method="fedit")[1]
    np.testing.assert_allclose(lines(axes[3, 0])["fedit"][1], error)
    np.testing.assert_allclose(axes[3, 0].lines[1].get_ydata(), 2.0)
    np.testing.assert_allclose(lines(axes[3, 1])["fedit"][1], error / 2)
    assert all(axis.get_yscale() == "linear" and axis.get_ylim()[0] == 0 for axis in axes.flat)


@pytest.mark.drawn
def test_more_than_a_decade_is_drawn_on_a_logarithmic_axis_without_its_zeros(png):
    table = geometry_rows()
    table.loc[table["round"] == 1, "turn_per_distance_B"] = 0
    table.loc[table["round"] == 2, "turn_per_distance_B"] = 0.01
    axis = plot_geometry(table, png).axes[3]
    y = axis.lines[0].get_ydata()
    assert axis.get_yscale() == "log" and np.isnan(y[0]) and y[1] == pytest.approx(0.01)


def test_an_exact_method_has_no_error_but_rounding(png):
    table = geometry_rows()
    exact = table["method"] == "fedrot"
    table.loc[exact, ["error_bound", "aggregation_error"]] = 0.0, 1e-14
    axes = plot_geometry(table, png).axes
    assert list(lines(axes[6])) == list(lines(axes[7])) == ["fedit"]


def test_what_a_method_lacks_is_left_out(png):
    """A frozen factor has no ratios; a method may have no error."""
    table = geometry_rows(aggregation_error=None).drop(columns=["removed_A", LARGEST.format("A")])
    axes = plot_geometry(table, png).axes
    assert not axes[0].lines and axes[1].lines and not lines(axes[6])


def test_starts_have_lines_of_their_own(png):
    table = pd.concat([geometry_rows(), geometry_rows(start="independent")])
    labels = [text.get_text() for text in plot_geometry(table, png).legends[0].get_texts()]
    assert labels == [f"{method}, {start} start" for start in ("shared", "independent") for method in ("fedit", "fedrot")]


@pytest.mark.parametrize("rounds", [1, 2, 6, 20, 250])
def test_the_axis_of_rounds_begins_at_1(rounds, png):
    table = pd.DataFrame(
        {"round": r, "method": "fedit", "accuracy": 0.5, "relative_error": 0.1} for r in range(1, rounds + 1)
    )
    comparison = table.assign(start="shared", seed=0)
    for figure in (plot_run(table.to_dict("records"), SimulationConfig(), png), plot_comparison(comparison, png)):
        figure.draw_without_rendering()
        low, high = figure.axes[-1].get_xlim()
        shown = [x for x in figure.axes[-1].get_xticks() if low <= x <= high]
        assert shown[0] == 1 and shown == sorted(set(shown)) and all(x == int(x) for x in shown)
        assert len(shown) == min(rounds, len(shown)) and (rounds == 1 or shown[-1] > 0.7 * rounds)


def test_errors_that_were_not_measured_have_no_panel(png):
    table = rows(["fedit"], relative_error=None)
    assert shown_measures(table) == ["accuracy"]
    figure = plot_comparison(table, png)
    assert [axis.get_title() for axis in figure.axes] == ["shared start", "independent start"]
    assert [list(lines(axis)) for axis in figure.axes] == [["fedit"], ["fedit"]]
    assert [axis.get_xlabel() for axis in figure.axes] == ["round", "round"]
    assert len(plot_sweep(table.assign(lr=0.1), "lr", png).axes) == 2
    assert len(plot_run(table[table["start"] == "shared"].to_dict("records"), SimulationConfig(), png).axes) == 1
    assert shown_measures(rows(["fedit"])) == ["accuracy", "relative_error"]
