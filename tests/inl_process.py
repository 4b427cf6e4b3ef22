"""`inl` in a process of its own."""

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(command, **settings):
    """A process with this project first on its path, on the CPU."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        list(map(str, command)),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def run(*command, **settings):
    """Runs a process; returns (exit code, stdout, stderr, seconds of CPU time)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(command, **settings)
    out, err = process.communicate(timeout=900)  # on a busy machine too
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return process.returncode, out, err, cpu


def run_inl(*argv, **settings):
    return run(sys.executable, "-m", "inl_jax", *argv, **settings)
