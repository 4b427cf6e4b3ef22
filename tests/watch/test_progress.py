import math

import pytest

from inl_jax.watch.progress import Standing, Stretch, lowest, over_fitting, standing


def evaluations(*losses, basis="text"):
    return [
        {"step": 10 * i, "validation_loss": loss, "basis": basis}
        for i, loss in enumerate(losses, start=1)
    ]


def test_standing_counts_the_evaluations_since_the_last_improvement():
    assert standing([], basis="text") == Standing(0, math.inf, 0)
    assert standing(evaluations(3.0), basis="text") == Standing(10, 3.0, 0)
    assert standing(evaluations(3.0, 3.0), basis="text") == Standing(10, 3.0, 1)
    assert standing(evaluations(3.0, 2.0, 2.5, 2.1), basis="text") == Standing(20, 2.0, 2)


def test_standing_never_takes_nan_for_an_improvement():
    assert standing(evaluations(math.nan, 3.0, math.nan), basis="text") == Standing(20, 3.0, 1)
    assert standing(evaluations(math.nan, math.nan), basis="text").waited == 2


def test_standing_asks_for_more_than_min_delta_below_the_last_improvement():
    found = standing(evaluations(3.0, 2.95, 2.9, 2.85), basis="text", min_delta=0.125)
    assert found == Standing(40, 2.85, 0), "small steps add up"
    assert standing(evaluations(3.0, 2.875), basis="text", min_delta=0.125).waited == 1


def test_standing_leaves_out_other_records_and_other_texts():
    records = evaluations(1.0, basis="other") + [{"step": 15, "loss": 0.5}] + evaluations(3.0)
    assert standing(records, basis="text") == Standing(10, 3.0, 0)


def test_lowest_is_finite_of_the_same_text_and_among_the_updates_that_count():
    records = [
        *evaluations(3.0, math.nan, 1.0, 2.0),
        {"step": 10, "loss": 0.1},
        *evaluations(0.5, basis="other"),
    ]
    assert lowest(records, basis="text", among={10, 20, 40})["step"] == 40
    assert lowest(records, basis="text", among={20}) is None


@pytest.mark.parametrize(
    ("validation_loss", "verdict"),
    [(2.0, "good"), (2.49, "good"), (2.5, "watch it"), (3.0, "watch it"), (3.1, "over-fitting")],
)
def test_over_fitting_compares_with_the_mean_over_the_same_updates(validation_loss, verdict):
    stretch = Stretch().add(1.0).add(3.0).add(math.nan).add(math.inf)
    found = over_fitting(validation_loss, stretch)
    assert found["train_loss"] == 2.0 and found["verdict"] == verdict
    assert found["gap"] == pytest.approx(validation_loss - 2)


def test_over_fitting_judges_nothing_without_two_finite_losses():
    assert over_fitting(2.0, Stretch()) == {}
    assert over_fitting(math.nan, Stretch().add(1.0)) == {"train_loss": 1.0}
