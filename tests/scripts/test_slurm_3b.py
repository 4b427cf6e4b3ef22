"""`scripts/slurm_3b.sh` under a Slurm of two commands, which note how they are called."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm_3b.sh"


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        *[(0, 0, False), (2, 0, False), (3, 0, False), (12, 0, False), (28, 0, False)],
        *[(75, 0, True), (75, 1000, True)],
        *[(code, 4, True) for code in (1, 110, 134, 137, 139)],
        *[(code, 5, False) for code in (1, 110, 134, 137, 139)],
    ],
)
def test_slurm_job_is_requeued_if_the_same_command_may_succeed(tmp_path, code, restarts, requeued):
    for name, does in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" > {tmp_path}/requeued')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DATA": "text.txt",
        "SLURM_JOB_ID": "77",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_RESTART_COUNT": str(restarts),
        "MAX_RESTARTS": "5",
    }
    done = subprocess.run(["bash", SCRIPT], env=variables, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    asked = tmp_path / "requeued"
    assert asked.exists() == requeued
    assert not requeued or asked.read_text() == "requeue 77\n"
