import io
import os
import pty
import subprocess
import sys
import termios
import threading

import pytest

from inl_jax import console
from inl_jax.failures import MachineFailure


def test_say_prints_whole_lines_to_the_current_stdout(capsys):
    console.say("one")
    console.say("two")
    assert capsys.readouterr() == ("one\ntwo\n", "")


def test_say_can_be_muted_and_sent_elsewhere(capsys):
    stream = io.StringIO()
    try:
        console.mute(True)
        console.say("nobody hears this")
        console.mute(False)
        console.speak_to(stream)
        console.say("over there")
    finally:
        console.mute(False)
        console.speak_to(None)
    assert capsys.readouterr().out == "" and stream.getvalue() == "over there\n"


def test_say_does_nothing_in_a_program_without_a_console(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    console.say("nobody hears this")


PROGRAM = """
from inl_jax import console
from inl_jax.failures import MachineFailure
bar = console.progress_bar(4, unit="update")
for i in range(4):
    bar.update()
    console.say(f"line {i}")
bar.close()
"""


def test_progress_bar_is_silent_off_a_terminal():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "line 0\nline 1\nline 2\nline 3\n" and done.stderr == ""


def test_progress_bar_on_a_terminal_keeps_lines_whole():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the terminal is closed
            break
        if not part:
            break
        shown += part
    assert done.wait() == 0
    text = shown.decode()
    assert "update" in text
    for i in range(4):  # at the start of a line, and nothing behind it
        assert f"\rline {i}\r\n" in text.replace("\x1b[K", "").replace("\x1b[A", "")


@pytest.mark.parametrize(
    "number, noun, shown",
    [
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (1, "micro-batch", "1 micro-batch"),
        (64, "micro-batch", "64 micro-batches"),
        (1000, "update", "1,000 updates"),
    ],
)
def test_plural(number, noun, shown):
    assert console.plural(number, noun) == shown


@pytest.mark.parametrize(
    "num_bytes, shown",
    [
        (0, "0 bytes"),
        (3, "3 bytes"),
        (2000, "1.95 KiB"),
        (5_550_000, "5.29 MiB"),
        (30.6e9, "28.50 GiB"),
        (0.1 * 2**30, "0.10 GiB"),
    ],
)
def test_size_is_never_zero_for_something(num_bytes, shown):
    assert console.size(num_bytes) == shown


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m 00s"),
        (306, "5m 06s"),
        (3600, "1h 00m"),
        (11_045, "3h 04m"),
        (86_399, "23h 59m"),
        (93_700, "1d 02h"),
    ],
)
def test_duration(seconds, shown):
    assert console.duration(seconds) == shown


@pytest.mark.parametrize(
    "number, shown",
    [(999, "999"), (1000, "1.00k"), (43_087_872, "43.09M"), (1_698_414_592, "1.70B")],
)
def test_count(number, shown):
    assert console.count(number) == shown


def test_first_line_falls_back_to_the_type():
    assert console.first_line(ValueError("one\ntwo")) == "one"
    assert console.first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


TALK = """
from inl_jax import console
from inl_jax.failures import MachineFailure
for _ in range(9):
    console.say("x" * 70000)
open("end", "w")
"""


def test_say_outlives_its_reader(tmp_path):
    """As in `inl train ... | head -1`: the run continues, muted."""
    command = [sys.executable, "-c", TALK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path)
    process.stdout.read(10)
    process.stdout.close()
    process.wait()
    assert (tmp_path / "end").exists()


def test_complain_and_flush_never_raise(monkeypatch):
    for stream in (None, open(os.devnull)):  # closed, and one that cannot be written
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr("sys.stdout", stream)
        console.complain("the last line")
        console.flush()


class Stream:
    """What programs put in the place of a stream: `write` and nothing else."""

    def __init__(self, encoding="utf-8"):
        self.text, self._encoding = "", encoding

    def write(self, text):
        text.encode(self._encoding)
        self.text += text


class Broken:
    """A stream of which everything fails."""

    encoding = "utf-8"

    def __init__(self, error):
        self.error = error

    def _fail(self, *_):
        raise self.error

    write = flush = isatty = fileno = _fail


class BrokenTerminal(Broken):
    """A terminal that was lost after the start."""

    def isatty(self):
        return True

    def fileno(self):
        return 2

    def flush(self):
        pass


def odd_streams():
    closed = io.StringIO()
    closed.close()
    return [
        None,
        closed,
        Stream("ascii"),
        open("/dev/full", "w"),
        open(os.devnull),
        io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
        *map(Broken, (RuntimeError(), BrokenPipeError(), BlockingIOError(), UnicodeError())),
        BrokenTerminal(RuntimeError()),
        BrokenTerminal(OSError(28, "No space left on device")),
    ]


@pytest.mark.parametrize("stream", odd_streams(), ids=lambda stream: type(stream).__name__)
def test_lines_and_progress_bars_end_nothing_on_any_stream(stream, monkeypatch):
    for out, err in ((stream, stream), (stream, Stream()), (Stream(), stream)):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", err)
            bar = console.progress_bar(3, unit="update")
            for _ in range(3):
                bar.set_postfix_str("loss 1.0", refresh=True)
                bar.update()
                console.say("é \ud800 猫")
            bar.close()
            console.complain("é \ud800 猫")
            if isinstance(out, Stream) and out is not stream:
                assert out.text.count("猫\n") == 3


def test_lost_terminal_of_a_bar_loses_no_line(monkeypatch):
    monkeypatch.setattr("sys.stderr", BrokenTerminal(OSError(5, "Input/output error")))
    monkeypatch.setattr("sys.stdout", out := Stream())
    bar = console.progress_bar(2, unit="update")
    console.say("a line")
    bar.close()
    assert out.text == "a line\n"


@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("utf-8", "é 猫 \\ud800"),
        ("cp1252", "é \\u732b \\ud800"),
        ("ascii", "\\xe9 \\u732b \\ud800"),
    ],
)
def test_what_a_terminal_cannot_show_is_escaped(encoding, shown, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    console.say("é 猫 \ud800")
    console.show("é 猫 \ud800")
    assert raw.getvalue().decode(encoding) == f"{shown}\n" * 2
    monkeypatch.setattr("sys.stdout", bare := Stream(encoding))  # it does not tell its encoding
    console.say("\ud800")
    assert bare.text == "\\ud800\n"


def test_say_goes_on_once_the_stream_works_again(monkeypatch):
    stream = Stream()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr(stream, "write", Broken(OSError(28, "full")).write, raising=False)
    console.say("lost")
    monkeypatch.undo()
    monkeypatch.setattr("sys.stdout", stream)
    console.say("there")
    assert stream.text == "there\n"


def test_show_drops_a_result_that_nobody_reads_and_fails_if_it_cannot_be_written(monkeypatch):
    for stream in (None, Broken(BrokenPipeError())):
        monkeypatch.setattr("sys.stdout", stream)
        console.show("a result")
    for stream in (open("/dev/full", "w"), Broken(RuntimeError("gone"))):
        monkeypatch.setattr("sys.stdout", stream)
        with pytest.raises(MachineFailure, match="No space left on device|gone") as caught:
            console.show("a result")
        assert caught.value.exit_code == 1


def test_muted_is_over_with_its_block(capsys):
    with console.muted(True), console.muted(False):
        console.say("nobody hears this")
    console.say("heard")
    assert capsys.readouterr().out == "heard\n"


def test_progress_bar_leaves_no_thread_behind(monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Stream())
    terminal.isatty, terminal.fileno = lambda: True, lambda: 2
    terminal.flush = lambda: None
    before = threading.enumerate()
    bar = console.progress_bar(2, unit="update")
    assert threading.enumerate() == before and "update" in terminal.text
    bar.close()
