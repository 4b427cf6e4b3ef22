import math

import pytest

from inl_jax.config import TrainConfig, with_fields
from inl_jax.watch.divergence import LEAST, Losses

CONFIG = with_fields(TrainConfig(), {"run_dir": "my runs/a", "optim.learning_rate": 1e-3})


def losses_of(*values):
    losses = Losses(vocab_size=300)
    for step, loss in enumerate(values, start=1):
        losses.add(step, loss)
    return losses


def describe(losses, saved, best=None):
    return losses.describe_divergence(4, 30, CONFIG, saved, best)


def test_state_is_good_if_the_loss_of_the_next_update_is_near_the_others():
    losses = losses_of(*[3.0] * 10, 40.0, math.nan, math.nan)
    assert losses.far
    text = describe(losses, {6, 8, 10, 12})
    assert text.startswith("4 updates in a row, up to update 30, had a non-finite loss")
    assert (
        "the last good checkpoint in my runs/a is update 8: run `rm -r 'my runs/a/checkpoints"
        in (text)
    )
    assert "checkpoints/10' 'my runs/a/checkpoints/12'`, then add --optim.learning_rate 0.0005" in (
        text
    )


def test_finite_losses_worse_than_a_guess_are_not_good_from_the_first_on():
    losses = losses_of(5.7, *[1e5] * 3, math.nan)
    text = describe(losses, {2, 4})
    assert "none of the checkpoints in my runs/a is known to be good ([2, 4]): start anew" in text
    assert "the last good checkpoint in my runs/a is update 2: run" in describe(losses, {2, 4}, 2)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_loss_far_above_the_others_forbids_saving_until_it_is_their_level(said, noise):
    losses = losses_of(*(4 + noise * (-1) ** i for i in range(100)))
    assert losses.allow_saving(100) and not said
    step = 101
    losses.add(step, 4 + 2 * noise)
    assert losses.allow_saving(step), "as noisy as the others"
    losses.add(step, 14.0)
    assert not losses.allow_saving(step) and "update 101 is not saved: its loss is far" in said[0]
    for step in range(102, 300):
        losses.add(step, 14.0)
    assert losses.allow_saving(300)


def test_few_losses_forbid_no_saving():
    losses = losses_of(*[1.0] * (LEAST - 1), 5.0)
    assert losses.allow_saving(LEAST)
