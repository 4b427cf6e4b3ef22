import math

import numpy as np

from inl_jax.report.charts import (
    MAX_POINTS,
    learning_figures,
    moving_average,
    speed_figures,
    thinned,
)


def titles(figures):
    return [figure.title for figure in figures]


def trace_of(figures, title, number=0):
    return next(f for f in figures if f.title == title).data[number]


def test_a_chart_without_values_is_left_out(make_run, evaluation):
    old = make_run()
    assert titles(learning_figures([old])) == ["Training loss", "Learning rate", "Gradient norm"]
    assert titles(speed_figures([old])) == ["Throughput"]
    for record in old.records:
        record["loss"] = math.nan
    assert "Training loss" not in titles(learning_figures([old]))
    new = make_run(records=[evaluation(10, 4.0, train_loss=3.9, gap=0.1)])
    new.records[-1] |= {"skipped": 2, "peak_memory": 2**30, "gpu_util": 0.5, "mfu": 0.4}
    assert {"Validation loss", "Gap", "Skipped updates"} <= set(titles(learning_figures([new])))
    figures = speed_figures([new])
    assert {"MFU", "Memory of a device", "GPU utilisation"} <= set(titles(figures))
    assert trace_of(figures, "Memory of a device")["y"] == [1.0]  # GiB
    assert trace_of(figures, "MFU")["y"] == [40.0]  # %


def test_a_run_has_one_colour_on_all_charts_even_where_another_run_is_missing(make_run, evaluation):
    runs = [make_run("a"), make_run("b", records=[evaluation(10, 4.0)])]
    figures = learning_figures(runs)
    loss = next(f for f in figures if f.title == "Training loss").data
    colors = {trace["name"]: trace["line"]["color"] for trace in loss if "showlegend" not in trace}
    assert len(set(colors.values())) == 2
    validation = trace_of(figures, "Validation loss")
    assert validation["name"] == "b" and validation["line"]["color"] == colors["b"]


def test_the_lowest_validation_loss_has_the_star(make_run, evaluation):
    run = make_run(records=[evaluation(5, 5.0), evaluation(10, 4.0), evaluation(15, 4.5)])
    trace = trace_of(learning_figures([run]), "Validation loss")
    assert trace["marker"]["symbol"] == ["circle", "star", "circle"]


def test_validation_loss_is_drawn_by_source(make_run, evaluation):
    sources = {"prose": {"loss": 3.0}, "code": {"loss": 2.0}}
    run = make_run(records=[evaluation(10, 2.5, sources=sources)])
    (figure,) = (f for f in learning_figures([run]) if f.title == "Validation loss by source")
    assert [(trace["name"], trace["y"]) for trace in figure.data] == [
        ("prose", [3.0]),
        ("code", [2.0]),
    ]


def test_labels_of_the_gap_stand_between_its_lines_at_opposite_ends(make_run, evaluation):
    run = make_run(records=[evaluation(10, 4.0, gap=-3.0)])
    (gap,) = (f for f in learning_figures([run]) if f.title == "Gap")
    lower, upper = gap.layout["shapes"]
    assert lower["y0"] == lower["y1"] < upper["y0"] == upper["y1"]
    assert (lower["label"]["yanchor"], upper["label"]["yanchor"]) == ("bottom", "top")
    assert lower["label"]["textposition"] != upper["label"]["textposition"]


def test_counts_of_skipped_updates_have_whole_ticks(make_run):
    def ticks(skipped):
        run = make_run()
        run.records[-1]["skipped"] = skipped
        (figure,) = (f for f in learning_figures([run]) if f.title == "Skipped updates")
        return figure.layout["yaxis"].get("dtick")

    assert ticks(1) == ticks(5) == 1
    assert ticks(6) is None  # plotly.js chooses: at least 1


def test_thinned_keeps_the_ends_the_extremes_and_the_gaps():
    values = np.random.default_rng(0).normal(size=100_000)
    values[40_000], values[70_000] = 50, -50
    values[20_000:30_000] = np.nan
    kept = thinned(values)
    assert len(kept) <= MAX_POINTS + 2 and (np.diff(kept) > 0).all()
    assert {0, 40_000, 70_000, 99_999} <= set(kept) and np.isnan(values[kept]).any()
    np.testing.assert_array_equal(thinned(values[:MAX_POINTS]), np.arange(MAX_POINTS))


def test_a_thinned_chart_says_so(make_run):
    run = make_run(updates=MAX_POINTS + 1)
    assert f"Of {MAX_POINTS + 1:,} records" in learning_figures([run])[0].caption
    assert "records" not in learning_figures([make_run()])[0].caption


def test_moving_average_is_exact_for_a_constant_and_passes_over_gaps():
    values = np.array([2.0, 2.0, np.nan, 2.0])
    np.testing.assert_allclose(moving_average(values), values)
    noisy = 3 + np.random.default_rng(0).normal(size=1000)
    assert np.abs(moving_average(noisy)[100:] - 3).max() < 1
