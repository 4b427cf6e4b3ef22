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
import os, sys, time
Table, finish = dict, lambda: None
def define_metric(*_, **__): pass
class Run: url = None; define_metric = define_metric
def init(**_):
    print("chatter"){init}
    return Run
def log(*_, **__): {log}
"""
# Bytes that are no text where lines for the user go; more than a disk can bear; a secret.
BAD_INIT = """
    os.write(3, bytes([255, 10]))
"""
BAD_LOG = """
    print(4000 * (1000 * "x" + os.linesep))
    raise OSError(28, "No space left on device", "https://ann:pa55@host/x")
"""


def test_check_trackers_says_how_to_install_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # a folder of runs is no package
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    packages = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
    for name, package in packages.items():
        monkeypatch.delitem(sys.modules, package, raising=False)
        with pytest.raises(InputError, match=rf"pip install 'inl_jax\[{name}\]'"):
            check_trackers([name])


# A child that outlives its tracker, until its file is removed.
FORK = """
    if not os.fork():
        for _ in range(300):
            time.sleep(0.1)
            if not os.path.exists(__file__): os._exit(0)
        open(__file__ + ".ended", "w")
        os._exit(0)
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A folder from which the trackers import their packages."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    return folder


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_trackers_that_fail_or_hang_cost_one_line_each(tmp_path, stubs, monkeypatch, said):
    (stubs / "wandb.py").write_text(STUB.format(init=BAD_INIT, log=BAD_LOG))
    (stubs / "trackio.py").write_text(STUB.format(init="", log="time.sleep(60)"))
    (stubs / "tensorboardX.py").write_text("import os; os._exit(0)")
    monkeypatch.setattr(trackers, "GRACE", 0.2)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    names = ("wandb", "trackio", "tensorboard", "trackio")  # one of them twice
    running = Trackers(names, tmp_path, project="p", step=1)
    wait_for(lambda: len(said) == 5)
    running.close()

    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    warnings = sorted(line for line in said if line.startswith("WARNING"))
    assert len(warnings) == 3 and len(said) == 6, said
    assert warnings[0].startswith("WARNING: tracker tensorboard: its process ended with code 0")
    assert warnings[1].startswith("WARNING: tracker trackio: not finished 0.2 seconds after")
    assert "No space left on device" in warnings[2] and "it gets no more records" in warnings[2]
    assert "\N{REPLACEMENT CHARACTER}" in said
    log = (tmp_path / "trackers" / "wandb.log").read_text()
    assert "chatter" in log and len(log) < 2**21
    assert not any("pa55" in text for text in (log, *said))


@pytest.mark.slow
def test_trackers_end_with_their_own_process_and_not_with_its_children(
    tmp_path, stubs, monkeypatch, said
):
    (stubs / "wandb.py").write_text(STUB.format(init=FORK, log="pass"))
    (stubs / "trackio.py").write_text(STUB.format(init="", log="sys.exit(0)"))
    (stubs / "tensorboardX.py").write_text("import os; os.closerange(0, 256)")
    monkeypatch.setattr(trackers, "GRACE", 60)
    running = Trackers(("wandb", "trackio", "tensorboard"), tmp_path, project="p", step=1)
    wait_for(lambda: len(said) == 4)
    running.close()
    assert not (stubs / "wandb.py.ended").exists()
    (stubs / "wandb.py").unlink()
    warnings = sorted(line for line in said if line.startswith("WARNING"))
    assert len(warnings) == 2 and len(said) == 4, said
    assert warnings[0].startswith("WARNING: tracker tensorboard: its process ended with code 1")
    assert warnings[1].startswith("WARNING: tracker trackio: SystemExit: 0; it gets no more")


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
def test_trackers_of_a_killed_run_send_all_that_was_written(tmp_path, stubs, monkeypatch):
    (tmp_path / "metrics.jsonl").unlink()
    (stubs / "wandb.py").write_text(STUB.format(init="", log='print("chatter")'))
    monkeypatch.setenv("PYTHONPATH", f"{stubs}:{Path(__file__).parents[2]}")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.DEVNULL)
    sent = tmp_path / "trackers" / "wandb.json"
    wait_for(sent.exists)
    assert json.loads(sent.read_text()) == {"loss": 7, "offset": 0}
