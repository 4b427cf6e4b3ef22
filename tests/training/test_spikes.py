import functools

import jax
import numpy as np
import pytest
from conftest import assert_same

from inl_jax.training.spikes import IN_A_ROW, LEAST, WINDOW, init_window, judge


@functools.cache
def jitted(multiple=5.0):
    return jax.jit(functools.partial(judge, multiple=multiple))


def run(norms, window=None):
    """The window after `norms`, and which were spikes."""
    window, spikes = window or init_window(), []
    for norm in norms:
        window, spike, _ = jitted()(window, np.float32(norm), finite=np.isfinite(norm))
        spikes.append(bool(spike))
    return window, spikes


def test_spike_is_a_multiple_of_the_median_of_the_last_accepted_norms():
    norms = np.random.default_rng(0).lognormal(0, 1.2, 3 * WINDOW).astype(np.float32)
    accepted, expected = [], []
    for norm in norms:
        known = len(accepted) >= LEAST
        expected.append(known and norm > 5 * np.median(accepted[-WINDOW:]))
        accepted += [] if expected[-1] else [norm]
    assert run(norms)[1] == expected and 10 < sum(expected) < WINDOW


def test_nothing_is_a_spike_before_the_least_number_of_norms():
    assert run([1.0] * (LEAST - 1) + [1e6] + [1.0] * LEAST)[1] == [False] * (2 * LEAST)


@pytest.mark.parametrize("norm", [np.nan, np.inf, 1e30])
def test_window_is_not_poisoned_by_what_is_skipped(norm):
    window, _ = run([1.0, 2.0, 3.0] * LEAST)
    after, _ = run([norm], window)
    assert_same((after.norms, after.accepted), (window.norms, window.accepted))
    assert run([2.0, 100.0], after)[1] == [False, True]


def test_lasting_change_of_level_is_accepted_and_its_norms_are_the_new_window():
    window, _ = run([1.0] * WINDOW)
    level, spikes = run([50.0] * (IN_A_ROW + LEAST), window)
    assert spikes == [True] * IN_A_ROW + [False] * LEAST
    assert run([60.0, 1000.0], level)[1] == [False, True]
