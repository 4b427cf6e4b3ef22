"""Killed in the middle of a save, at each of its calls to the file system."""

import concurrent.futures
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from legs import ROOT

from inl_jax.storage.checkpoint import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.faults]

POINTS, SAVES, SEED = 40, 4, 15
CALLS = ("mkdir", "mkdirat", "fsync", "fdatasync", "rename", "renameat", "renameat2")
CALLS += ("unlink", "unlinkat", "rmdir")

# Saves states of which each value is the number of the step, and promises each once it is on disk.
SAVER = f"""
import sys
import jax.numpy as jnp
from inl_jax.storage.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1], keep_last=1)
for step in range(1, {SAVES} + 1):
    w = jnp.full(64, step, float)
    checkpoints.save(step, {{"w": w}}, {{"m": -w}}, position={{"samples_seen": step}})
    checkpoints.note_best(step, 1 / step)
    print("promised", step, flush=True)
checkpoints.close()
"""


@pytest.fixture(scope="module")
def strace():
    """Runs the saver under strace; returns (exit code, stdout, stderr)."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-o", os.devnull, "true"]).returncode:
        pytest.skip("strace may not trace here")

    def run(run_dir, *options):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        only = "trace=" + ",".join(f"?{call}" for call in CALLS)
        command = ["strace", "-f", "-e", only, *options]
        command += [sys.executable, "-c", SAVER, run_dir]
        done = subprocess.run(
            list(map(str, command)), env=env, capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout, done.stderr

    return run


def count_calls(trace):
    """The most calls of each kind that one thread made: strace counts in each thread."""
    calls = Counter(re.findall(rf"^(\d+) +({'|'.join(CALLS)})\(", trace, re.MULTILINE))
    most = Counter()
    for (_, call), number in calls.items():
        most[call] = max(most[call], number)
    return most


def check(run_dir, promised):
    """Reads what a killed saver left: the newest step that it promised, or a later one."""
    checkpoints = Checkpoints(run_dir, keep_last=1)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    array = jax.ShapeDtypeStruct((64,), np.float32, sharding=here)
    found = checkpoints.restore({"params": {"w": array}, "optimizer": {"m": array}})
    best, steps = checkpoints.best_step(), checkpoints.steps()
    checkpoints.close()
    step = found["step"] if found else 0
    assert promised <= step <= promised + 1
    if found:
        assert set(np.asarray(found["params"]["w"])) == {step}
        assert set(np.asarray(found["optimizer"]["m"])) == {-step}
        assert found["position"] == {"samples_seen": step}
    assert best is None or best in steps
    assert not (run_dir / "damaged").exists()


def test_a_save_killed_at_any_call_to_the_file_system_keeps_the_newest_promised_step(
    strace, tmp_path, tell
):
    trace = tmp_path / "trace"
    code, _, err = strace(tmp_path / "whole", "-o", trace)
    assert code == 0, err
    calls = count_calls(trace.read_text())
    every = [(call, k) for call, most in sorted(calls.items()) for k in range(1, most + 1)]
    points = random.Random(SEED).sample(every, min(POINTS, len(every)))

    def kill_at(point):
        call, k = point
        run_dir = tmp_path / f"{call}-{k}"
        code, out, _ = strace(
            run_dir, "-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when={k}"
        )
        return run_dir, code, len(re.findall("promised", out))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        killed = [(run_dir, n) for run_dir, code, n in pool.map(kill_at, points) if code]
    assert len(killed) > len(points) / 2
    for run_dir, promised in killed:
        if run_dir.exists():
            check(run_dir, promised)
    tell(
        f"killed at {len(killed)} of {len(every)} calls ({', '.join(calls)}) of {SAVES} saves: "
        "the newest promised step was read each time, 0 damaged"
    )
