"""What stands beside a training ends nothing: its console, its log, its trackers' disk."""

import os
import subprocess
from pathlib import Path

import pytest
from legs import Leg, log_of, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run when nothing is wrong: its log and the last state."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), num_steps=10)
    leg = Leg(config)
    assert leg.wait() == [0]
    return log_of(config.run_dir), leg.digests("saved")[10]


LOGS = {
    "on a full disk": lambda path: path.symlink_to("/dev/full"),
    "a directory": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to nowhere": lambda path: path.symlink_to("nowhere/else"),
}
CONSOLES = {
    "on a full disk": lambda: {"stdout": open("/dev/full", "w"), "stderr": open("/dev/full", "w")},
    "without a reader": lambda: {"stdout": _without_reader(), "stderr": subprocess.DEVNULL},
    "closed": lambda: {"prefix": ["sh", "-c", 'exec "$@" >&- 2>&-', "sh"]},
    "in ASCII": lambda: {"variables": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}},
}


def _without_reader():
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def final_digest(config):
    """The digest of the state that a complete run has on disk."""
    leg = Leg(config)
    assert leg.wait() == [0], leg.out()
    return leg.digests("restored")[10]


@pytest.mark.parametrize("kind", LOGS)
def test_a_log_that_cannot_be_written_ends_no_run(tmp_path, whole, tell, kind):
    config = tiny_config(tmp_path, num_steps=10)
    log = Path(config.run_dir) / "metrics.jsonl"
    log.parent.mkdir()
    LOGS[kind](log)
    leg = Leg(config)
    assert leg.wait() == [0], leg.out()
    assert leg.digests("saved")[10] == whole[1] and "WARNING" in leg.out()
    tell(f"log {kind}: the run completed, its final state bit-equal")


@pytest.mark.parametrize("kind", CONSOLES)
def test_a_console_that_cannot_be_written_ends_no_run(tmp_path, whole, tell, kind):
    config = tiny_config(tmp_path, num_steps=10)
    assert Leg(config, **CONSOLES[kind]()).wait() == [0]
    assert log_of(config.run_dir) == whole[0] and final_digest(config) == whole[1]
    tell(f"console {kind}: the run completed, its final state and log bit-equal")
