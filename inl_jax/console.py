"""What a user sees: lines, results, a progress bar on a terminal, and numbers in readable units.

`say` is the only channel for lines, `show` for results. Of several processes only process 0 says
lines; the others are muted. Nothing that stdout or stderr does ends a run.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

from inl_jax.checks import one_line
from inl_jax.failures import MachineFailure

_muted = False
_stream: TextIO | None = None


def say(line: str) -> None:
    """Prints one line, whole, above any progress bar. Never raises: no line is worth a run."""
    stream = _stream or sys.stdout
    if not _muted and stream is not None:  # None: a program without a console
        with contextlib.suppress(Exception):
            _write(stream, line)


def show(text: str, *, end: str = "\n") -> bool:
    """Prints a result to stdout. Once its reader has gone, as `| head` does, it is dropped.

    Args:
      text: the result, or a part of it.
      end: what is printed after it.

    Returns:
      Whether there is still a reader.

    Raises:
      MachineFailure: stdout cannot be written, as on a full disk.
    """
    if sys.stdout is None:
        return False
    try:
        _write(sys.stdout, text, end)
    except BrokenPipeError:
        return False
    except Exception as error:
        raise MachineFailure(f"the result cannot be written to stdout ({reason(error)})") from None
    return True


def complain(line: str) -> None:
    """Prints a last line to stderr, for a process about to end. Never raises."""
    if sys.stderr is not None:
        with contextlib.suppress(Exception):
            _write(sys.stderr, line)


def _write(stream: TextIO, text: str, end: str = "\n") -> None:
    """Writes `text` and `end`, with what the stream cannot encode escaped."""
    for encoding in (getattr(stream, "encoding", None) or "utf-8", "ascii"):
        try:
            encoded = text.encode(encoding, "backslashreplace")
            tqdm.write(encoded.decode(encoding), file=stream, end=end)
        except (UnicodeError, LookupError):
            continue
        stream.flush()
        return


def flush() -> None:
    """Flushes stdout and stderr, for a process about to end. Never raises.

    A stream that cannot be flushed is given up: Python would flush it again, and exit with 120.
    """
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except Exception:
            setattr(sys, name, None)


@contextlib.contextmanager
def muted(quiet: bool) -> Iterator[None]:
    """Turns `say` and progress bars of this process off in the block, if `quiet`."""
    global _muted
    before, _muted = _muted, _muted or quiet
    try:
        yield
    finally:
        _muted = before


def mute(muted: bool) -> None:
    """Turns `say` and progress bars of this process off or on."""
    global _muted
    _muted = muted


def speak_to(stream: TextIO | None) -> None:
    """Sends lines to another stream; None is the current `sys.stdout`."""
    global _stream
    _stream = stream


@contextlib.contextmanager
def aside(what: str) -> Iterator[None]:
    """For what stands beside the training: an error in the block is one line, and ends nothing."""
    try:
        yield
    except Exception as error:
        say(f"WARNING: {what} failed ({type(error).__name__}: {first_line(error)})")


class _Bar(tqdm):
    """A bar that is taken away where it cannot be written."""

    monitor_interval = 0  # tqdm's thread would stay behind in the program that trains

    def display(self, *args, **settings):
        return self._unless_it_fails(super().display, *args, **settings)

    def clear(self, *args, **settings):
        return self._unless_it_fails(super().clear, *args, **settings)

    def close(self):
        return self._unless_it_fails(super().close)

    def _unless_it_fails(self, act, *args, **settings):
        try:
            return act(*args, **settings)
        except Exception:
            self.disable = True


def progress_bar(total: float, *, unit: str, done: float = 0) -> tqdm:
    """A progress bar on stderr; silent where that is no terminal.

    Args:
      total: units of work in all; 0 if unknown.
      unit: name of a unit. Bytes ("B") are scaled to MB and GB.
      done: units finished before.
    """
    try:
        terminal = not _muted and sys.stderr.isatty() and sys.stderr.fileno() >= 0
        sys.stderr.flush()
    except Exception:  # there is no stderr, or one that is nothing but a stream
        terminal = False
    return _Bar(
        total=total or None,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        leave=False,
        dynamic_ncols=True,
        disable=not terminal,
    )


def plural(number: int, noun: str) -> str:
    """`1 process`, `2 processes`."""
    if number == 1:
        return f"{number} {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith(('s', 'ch', 'x')) else 's'}"


def size(num_bytes: float) -> str:
    """Bytes: 28.52 GiB, and below 0.1 GiB 3.40 MiB, 2.93 KiB or 512 bytes."""
    for unit, factor, least in (("GiB", 2**30, 0.1), ("MiB", 2**20, 0.1), ("KiB", 2**10, 1)):
        if num_bytes >= least * factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


def count(number: float) -> str:
    """Parameters or tokens: 1.70B."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.2f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds: 1d 02h, 3h 04m, 5m 06s."""
    seconds = int(seconds)
    for large, unit, small, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if seconds >= unit:
            return f"{seconds // unit}{large} {seconds % unit // part:02d}{small}"
    return f"{seconds // 60}m {seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type; for errors of one line."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])


def reason(error: BaseException) -> str:
    """Why something failed: what the system says of an error, as `No space left on device`."""
    return getattr(error, "strerror", None) or first_line(error)
