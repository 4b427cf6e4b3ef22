"""Saves, evaluations and samples over and over: nothing is left behind in the process."""

import os
import threading

import pytest

from inl_jax.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.faults]

SAVES = 100


def held():
    """How many descriptors and threads the process holds."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def test_a_run_of_many_saves_holds_no_more_descriptors_and_threads_than_one_of_few(
    train_config, tell
):
    found = {}
    config = train_config(
        num_steps=SAVES, save_every=1, eval_every=10, sample_every=0, eval_sequences=8
    )
    train(config, on_record=lambda record: found.setdefault(record["step"], held()))
    (fds, threads), (fds_after, threads_after) = found[20], found[SAVES]
    assert fds_after <= fds + 5 and threads_after <= threads + 5
    tell(
        f"{SAVES} saves: descriptors {fds} after 20 and {fds_after} at the end, threads {threads} "
        f"and {threads_after}"
    )
