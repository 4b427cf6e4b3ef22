"""kill -9 at random moments of a run: while it starts, trains, saves, deletes and evaluates."""

import concurrent.futures
import os
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from legs import Leg, log_of, temporary_files, tiny_config

from inl_jax.storage.weights import read_params

pytestmark = [pytest.mark.slow, pytest.mark.faults]

SEED = 15
KILLS, MOVED = 200, 70
ONE = {"processes": 1, "devices": 1}
TOPOLOGIES = [ONE, {"processes": 1, "devices": 2}, {"processes": 2, "devices": 1}]


class Copies:
    """Copies of one run, each killed again and again until it is complete."""

    def __init__(self, folder, topologies, kills, seed):
        self.folder, self.topologies, self.left = folder, topologies, kills
        self.rng = random.Random(seed)
        self.killed = {"starting": 0, "running": 0}
        self.restored = 0  # states, all with the bits that were saved

    def run(self):
        """Kills as often as planned, and lets the last copy end; returns the configs."""
        configs = []
        while self.left:
            folder = self.folder / str(len(configs))
            folder.mkdir(parents=True)
            configs.append(tiny_config(folder))
            self.run_one(configs[-1])
        return configs

    def run_one(self, config):
        saved = {}
        while True:
            leg = Leg(config, **self.rng.choice(self.topologies), pace=0.05)
            killed = self.left > 0 and self.kill(leg)
            codes = leg.wait()
            saved |= leg.digests("saved")
            for step, digest in leg.digests("restored").items():
                assert digest == saved[step], f"update {step} was restored with other bits"
                self.restored += 1
            if not killed:
                assert set(codes) == {0}, leg.out()[-3000:]
                return

    def kill(self, leg):
        """Kills a leg at a random moment; returns whether it was still running."""
        starting, delay = self.rng.random() < 0.15, self.rng.random()
        # Of two processes one is killed alone in a quarter of the legs; the other ends by itself.
        first = self.rng.choice([0, 0, 0, 1])
        if not starting and not leg.grown():
            return False
        time.sleep(6 * delay if starting else 1.2 * delay)
        if any(process.poll() is not None for process in leg.all):
            return False
        leg.signal(signal.SIGKILL, slice(first % len(leg.all), None))
        self.left -= 1
        self.killed["starting" if starting else "running"] += 1
        return True


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    """The config and the leg of the run as it is when nothing happens."""
    config = tiny_config(tmp_path_factory.mktemp("unkilled"))
    leg = Leg(config)
    assert leg.wait() == [0], leg.out()
    return config, leg


def kill_copies(folder, topologies, kills):
    """Kills copies of the run at several places of the machine at a time."""
    workers = os.cpu_count()
    copies = [
        Copies(folder / str(i), topologies, kills // workers + (i < kills % workers), SEED + i)
        for i in range(workers)
    ]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        configs = [config for found in pool.map(Copies.run, copies) for config in found]
    for config in configs:
        assert not temporary_files(config.run_dir)
        assert not (Path(config.run_dir) / "damaged").exists()
    killed = {when: sum(one.killed[when] for one in copies) for when in ("starting", "running")}
    restored = sum(one.restored for one in copies)
    figures = (
        f"kill -9 {sum(killed.values())} times (while starting {killed['starting']}) in "
        f"{len(configs)} copies of a run: {restored} states restored with the bits saved"
    )
    return configs, figures


def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(unkilled, tmp_path, tell):
    reference, leg = unkilled
    last = reference.num_steps
    configs, figures = kill_copies(tmp_path, [ONE], KILLS - MOVED)
    for config in configs:
        assert log_of(config.run_dir) == log_of(reference.run_dir)
        again = Leg(config)  # of a run that is complete: it reads the last state
        assert again.wait() == [0]
        assert again.digests("restored") == {last: leg.digests("saved")[last]}
    tell(f"one process, one device: {figures}; final state and log bit-equal, 0 files left over")


def test_a_run_killed_and_moved_between_devices_and_processes_loses_no_bit(
    unkilled, tmp_path, tell
):
    reference, _ = unkilled
    configs, figures = kill_copies(tmp_path, TOPOLOGIES, MOVED)
    _, wanted = read_params(reference.run_dir, reference.model)
    for config in configs:
        found, expected = log_of(config.run_dir), log_of(reference.run_dir)
        assert [record.keys() for record in found] == [record.keys() for record in expected]
        _, params = read_params(config.run_dir, config.model)
        # Sums over devices round otherwise: the next states are equal up to that.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), params, wanted
        )
    tell(f"1 and 2 processes, 1 and 2 devices: {figures}; final state equal to rounding")
