import json

import numpy as np
import pytest

from inl_jax.report.dynamics_charts import (
    LOOKS,
    dynamics_figures,
    layer_color,
    mixed,
    readable_on,
    stability_limits,
    token_figures,
)
from inl_jax.watch.integrator_probe import QUANTITIES


@pytest.fixture
def records():
    """Three records of 2 layers and 4 iterations, and one of an update between them."""
    rng = np.random.default_rng(0)

    def dynamics():
        found = {name: rng.uniform(0.1, 0.9, (2, 4)).tolist() for name in LOOKS}
        for layer in found["cosine"]:
            layer[0] = None
        return found

    found = [{"step": step, "num_steps": 30, "dynamics": dynamics()} for step in (10, 20, 30)]
    return [found[0], {"step": 11, "num_steps": 30, "loss": 3.0}, *found[1:]]


def test_every_measured_quantity_has_a_look():
    assert list(LOOKS) == list(QUANTITIES)


def test_run_without_dynamics_has_no_charts_of_them(records):
    assert dynamics_figures([records[1]]) == []


def test_maps_show_the_last_record_layer_by_iteration(records):
    figures = dynamics_figures(records)
    for (name, look), figure in zip(LOOKS.items(), figures, strict=False):
        assert figure.title == look.title and figure.caption.startswith("At update 30. ")
        (trace,) = figure.data
        np.testing.assert_allclose(
            np.array(trace["z"], float), np.array(records[-1]["dynamics"][name], float), rtol=1e-4
        )
        assert trace["x"] == [1, 2, 3, 4] and trace["y"] == [1, 2]
    assert [row[0] for row in trace["z"]] == [None, None]  # the cosine of the first iteration


def test_a_single_iteration_has_no_direction_and_no_convergence(records):
    dynamics = records[-1]["dynamics"]

    def titles(num_iterations):
        some = {name: [row[:num_iterations] for row in rows] for name, rows in dynamics.items()}
        return {figure.title for figure in dynamics_figures([{"step": 1, "dynamics": some}])}

    assert titles(2) - titles(1) == {"Direction", "Convergence"}


def test_charts_over_the_run_need_two_records(records):
    alone, all_of_them = dynamics_figures(records[-1:]), dynamics_figures(records)
    assert [f.title for f in all_of_them[: len(alone)]] == [f.title for f in alone]
    movement, distance, stiffness = all_of_them[len(alone) :]
    dynamics = [record["dynamics"] for record in (records[0], *records[2:])]
    for name, figure in (("rms_step", movement), ("rms_error", distance)):
        (trace,) = figure.data
        assert trace["x"] == [10, 20, 30]
        assert figure.layout["xaxis"]["type"] == "category"  # no tick between evaluations
        wanted = [[found[name][layer][-1] for found in dynamics] for layer in (0, 1)]
        np.testing.assert_allclose(trace["z"], wanted, rtol=1e-4)
    for layer, curve in enumerate(stiffness.data):
        wanted = [max(found["stiffness"][layer]) for found in dynamics]
        np.testing.assert_allclose(curve["y"], wanted, rtol=1e-4)


def test_charts_are_json_without_numbers_that_are_none(records):
    records[-1]["dynamics"]["beta"][0][0] = float("inf")  # of a run that diverged
    json.dumps(dynamics_figures(records), allow_nan=False)


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.8, 0.99])
def test_stability_limits_are_where_the_eigenvalues_of_a_step_change(alpha):
    """Of e = x - mu and v under a step with fixed coefficients, as `dynamics.move` takes it."""

    def eigenvalues(k, gate=0.5, dt=0.1):
        beta = k / dt / gate
        return np.linalg.eigvals([[1 - k, dt * gate * alpha], [-beta, alpha]])

    glides, swings, jumps = stability_limits(alpha)
    below, above = 1 - 1e-3, 1 + 1e-3
    assert np.isreal(eigenvalues(glides * below)).all() and (eigenvalues(glides * below) > 0).all()
    for k in (glides * above, swings * below):
        assert np.iscomplex(eigenvalues(k)).all()
        np.testing.assert_allclose(np.abs(eigenvalues(k)), np.sqrt(alpha))
    for k in (swings * above, jumps * below):
        if swings < k < jumps:
            assert np.isreal(eigenvalues(k)).all() and (eigenvalues(k) < 0).all()
            assert np.abs(eigenvalues(k)).max() < 1
    assert np.abs(eigenvalues(jumps * above)).max() > 1


def test_token_maps_escape_what_tokens_say():
    watched = {name: np.full((2, 3, 2), 0.5) for name in LOOKS}
    for figure in token_figures(watched, ["<b>", "x" * 40]):
        (trace,) = figure.data
        first, second = figure.layout["xaxis"]["ticktext"]
        assert first == "&lt;b&gt;" == trace["text"][1][0]
        assert len(second) < 20 and second.endswith("…")
    assert trace["z"] == [[1.5, 1.5]] * 2  # the movements of three iterations


def test_layers_have_distinct_colors_whatever_their_number():
    assert layer_color(0, 1) == layer_color(0, 48)
    assert len({layer_color(layer, 48) for layer in range(48)}) == 48


def test_numbers_on_cells_stand_out_from_every_colour_of_every_map():
    def luminance(color):  # WCAG 2
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    for look in LOOKS.values():
        for share in np.linspace(0, 1, 101):
            cell = mixed(look.colors.split(), share)
            dark, light = sorted(map(luminance, (cell, readable_on(cell))))
            assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_a_map_writes_its_values_on_its_cells_if_they_are_few(records):
    distance, *_, direction = dynamics_figures(records)[: len(LOOKS)]
    values = records[-1]["dynamics"]["rms_error"]
    labels = distance.layout["annotations"]
    shown = {(label["y"], label["x"]): label["text"] for label in labels}
    assert shown == {(i + 1, t + 1): f"{values[i][t]:.3g}" for i in (0, 1) for t in range(4)}
    assert min(label["x"] for label in direction.layout["annotations"]) == 2  # 1 has none
    for record in records[:1] + records[2:]:
        record["dynamics"] = {name: [[0.5] * 6] * 2 for name in LOOKS}
    assert not any(figure.layout["annotations"] for figure in dynamics_figures(records)[:7])
