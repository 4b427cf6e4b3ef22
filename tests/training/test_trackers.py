import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inl_jax.config import InputError
from inl_jax.training import trackers
from inl_jax.training.trackers import Trackers, check_trackers

STUB = """
import time
Table, finish = dict, lambda: None
def define_metric(*_, **__): pass
class Run: url = None; define_metric = define_metric
def init(**_): print("chatter"); return Run
def log(*_, **__): {log}
"""


def test_check_trackers_says_how_to_install_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # a folder of runs is no package
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    packages = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
    for name, package in packages.items():
        monkeypatch.delitem(sys.modules, package, raising=False)
        with pytest.raises(InputError, match=rf"pip install 'inl_jax\[{name}\]'"):
            check_trackers([name])


def test_trackers_that_fail_or_hang_cost_one_line_each(tmp_path, monkeypatch, said):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    full = "raise OSError(28, 'No space left on device')"
    (stubs / "wandb.py").write_text(STUB.format(log=full))
    (stubs / "trackio.py").write_text(STUB.format(log="time.sleep(60)"))
    (stubs / "tensorboardX.py").write_text("import sys; sys.exit('broken')")
    monkeypatch.setenv("PYTHONPATH", str(stubs))
    monkeypatch.setattr(trackers, "GRACE", 0.2)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    running = Trackers(("wandb", "trackio", "tensorboard"), tmp_path, project="p", step=1)
    deadline = time.monotonic() + 60
    while len(said) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    running.close()

    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    warnings = sorted(line for line in said if line.startswith("WARNING"))
    assert len(warnings) == 3 and len(said) == 5, said
    assert warnings[0].startswith("WARNING: tracker tensorboard: its process ended with code 1")
    assert warnings[1].startswith("WARNING: tracker trackio: not finished 0.2 seconds after")
    assert "No space left on device; it gets no more records, training goes on" in warnings[2]
    assert "chatter" in (tmp_path / "trackers" / "wandb.log").read_text()


def test_trackers_that_cannot_start_cost_one_line(tmp_path, said):
    (tmp_path / "trackers").write_text("")  # in the way of the folder
    Trackers(("tensorboard",), tmp_path, project="p", step=0).close()
    assert len(said) == 1 and said[0].startswith("WARNING: tracker tensorboard: ")


KILLED = """
import os, signal, sys
from pathlib import Path
from inl_jax.training.trackers import Trackers
Trackers(("wandb",), sys.argv[1], project="p", step=0)
Path(sys.argv[1], "metrics.jsonl").write_text('{"step": 7, "loss": 2.0}\\n{"step": 8, "lo')
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_trackers_of_a_killed_run_send_all_that_was_written(tmp_path, monkeypatch):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "wandb.py").write_text(STUB.format(log="pass"))
    monkeypatch.setenv("PYTHONPATH", f"{stubs}:{Path(__file__).parents[2]}")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.DEVNULL)
    sent = tmp_path / "trackers" / "wandb.json"
    deadline = time.monotonic() + 60
    while not sent.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert json.loads(sent.read_text()) == {"loss": 7}
