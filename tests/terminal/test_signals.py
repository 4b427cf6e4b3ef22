import signal
import sys
import time
from pathlib import Path

import pytest
from inl_process import ROOT, start

from inl_jax.terminal import signals

CODES = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75}
WORDS = {
    signal.SIGTERM: "terminated; ",
    signal.SIGINT: "interrupted; ",
    signal.SIGHUP: "terminated; ",
}
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def wait_until_caught(process):
    """Returns when the process has a handler for SIGTERM: before, nothing of ours has run."""
    bit = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if int(status.split("SigCgt:")[1].split()[0], 16) & bit:
            return
        time.sleep(0.001)


def signalled(argv, number, seconds, **settings):
    """(exit code, stderr) of `inl argv` that got a signal so many seconds after its first line."""
    process = start([sys.executable, "-m", "inl_jax", *argv], **settings)
    wait_until_caught(process)
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def check(found, number):
    code, err = found
    *before, last = err.splitlines()
    assert code == CODES[number] and last.startswith(WORDS[number]), found
    usual = ("data: ", "compiled programs ")  # what `evaluate --json` keeps apart from its result
    assert all(line.startswith(usual) for line in before), found


def train(tmp_path):
    return [
        "train",
        "--config",
        "tiny",
        "--run_dir",
        tmp_path / "run",
        "--data.cache_dir",
        tmp_path,
    ]


@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGTERM, 0), (signal.SIGINT, 0.2), (signal.SIGHUP, 0.7)]
)
def test_signal_while_train_imports_ends_it_with_its_code_and_one_line(tmp_path, number, seconds):
    check(signalled(train(tmp_path), number, seconds), number)


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
def test_signal_at_any_moment_of_the_start_ends_train_with_its_code_and_one_line(tmp_path, number):
    for moment in range(40):
        found = signalled(train(tmp_path), number, 0.1 * moment)
        if found == (75, ""):  # the start is over: it has ended as a training does, on stdout
            break
        check(found, number)
    assert moment > 10


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("verb", ["prepare", "estimate", "evaluate", "generate"])
def test_signal_at_any_moment_ends_every_verb_with_its_code_and_one_line(
    tmp_path, trained, verb, number
):
    argv = {
        "prepare": ["--config", "tiny", "--data.cache_dir", tmp_path],
        "estimate": ["--config", "small", "--devices", 4, "--compile"],
        "evaluate": ["--checkpoint", trained[1]],
        "generate": ["--checkpoint", trained[1], "--max_new_tokens", 5],
    }[verb]
    ended = 0
    for moment in range(12):
        code, err = signalled([verb, *argv], number, 0.25 * moment)
        if code != 0:  # else it was done before
            lines = [line for line in err.splitlines() if not line.startswith("compiled programs")]
            check((code, "\n".join(lines) + "\n"), number)
            ended += 1
        assert not list(tmp_path.glob("tmp.*")), "a temporary directory is left"
    assert ended > 3


def test_door_catches_signals_before_it_imports_anything_heavy(tmp_path):
    process = start([sys.executable, ROOT / "scripts/train.py", *train(tmp_path)[1:]])
    wait_until_caught(process)
    mapped = Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75 and "numpy" not in mapped and "jaxlib" not in mapped


UNWIND = """
import os, signal, sys, threading, time
from inl_jax.terminal import signals
signals.end_at_once()
signals.unwind(patience={patience})
number = signal.{number}
try:
    os.kill(os.getpid(), number)
    time.sleep(60)
except KeyboardInterrupt as stopped:
    print(type(stopped).__name__, flush=True)
    {after}
"""


@pytest.mark.parametrize(
    ("number", "after", "out"),
    [
        ("SIGTERM", "os.kill(os.getpid(), number)", "Stopped\n"),
        ("SIGINT", "os.kill(os.getpid(), number)", "KeyboardInterrupt\n"),
        ("SIGTERM", "time.sleep(60)", "Stopped\n"),
    ],
    ids=["twice", "Ctrl-C twice", "no end"],
)
def test_verb_unwinds_once_and_then_ends_at_a_second_signal_or_when_patience_ends(
    number, after, out
):
    code = UNWIND.format(number=number, after=after, patience=1)
    process = start([sys.executable, "-c", code])
    began = time.monotonic()
    assert process.communicate(timeout=60)[0] == out
    assert process.returncode == CODES[getattr(signal, number)] and time.monotonic() - began < 30


def test_hangup_is_ignored_if_it_was_before():
    """As by nohup."""
    code = """
import os, signal
from inl_jax.terminal import signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signals.end_at_once()
signals.unwind()
os.kill(os.getpid(), signal.SIGHUP)
print("goes on")
"""
    process = start([sys.executable, "-c", code])
    assert process.communicate(timeout=60) == ("goes on\n", "") and process.returncode == 0


def test_stop_that_python_drops_ends_the_process_all_the_same():
    code = """
import os, signal, time
from inl_jax.terminal import signals
signals.end_at_once()
signals.unwind(patience=None)

class Held:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

held = Held()
del held
time.sleep(60)
"""
    process = start([sys.executable, "-c", code])
    _, err = process.communicate(timeout=30)
    check((process.returncode, err), signal.SIGTERM)


def test_call_that_python_cannot_interrupt_is_ended_when_patience_ends():
    code = """
import hashlib
from inl_jax.terminal import signals
signals.end_at_once()
signals.unwind(patience=0.5)
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # as a compilation: minutes in C
"""
    process = start([sys.executable, "-c", code])
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err.startswith("terminated; "), err


def test_unwind_changes_nothing_in_a_process_that_main_did_not_start():
    before = signal.getsignal(signal.SIGTERM)
    signals.unwind()
    assert signal.getsignal(signal.SIGTERM) is before


def test_signal_is_held_while_a_checkpoint_is_read():
    """Orbax makes of an exception in the middle another one, which looks like damage."""
    code = """
import os, signal
from inl_jax.terminal import signals
signals.end_at_once()
signals.unwind()
with signals.held():
    os.kill(os.getpid(), signal.SIGTERM)
    print("read on", flush=True)
    raise OSError("as Orbax would")
"""
    process = start([sys.executable, "-c", code])
    out, err = process.communicate(timeout=30)
    assert out == "read on\n"
    check((process.returncode, err), signal.SIGTERM)


def test_leave_keeps_its_exit_code_without_a_stderr():
    """After a lost connection, say: a wrapper that waits for 75 must see 75."""
    code = """
import os, signal
from inl_jax.terminal import signals
signals.end_at_once()
os.close(2)
os.kill(os.getpid(), signal.SIGTERM)
"""
    process = start([sys.executable, "-c", code])
    process.communicate(timeout=30)
    assert process.returncode == 75
