"""What a user sees: lines, a progress bar on a terminal, and numbers in readable units.

`say` is the only channel for lines. Of several processes only process 0 prints; the others are
muted.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

_muted = False
_stream: TextIO | None = None


def say(line: str) -> None:
    """Prints one line, whole, above any progress bar."""
    stream = _stream or sys.stdout
    if not _muted and stream is not None:  # None: a program without a console
        try:
            tqdm.write(line, file=stream)
            stream.flush()
        except OSError:  # the reader has gone, as `| head` does, or its disk is full
            mute(True)


def complain(line: str) -> None:
    """Prints a last line to stderr, for a process about to end. Never raises."""
    with contextlib.suppress(Exception):
        print(line, file=sys.stderr, flush=True)


def flush() -> None:
    """Flushes stdout and stderr. Never raises: they may be closed, or their readers gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


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


def progress_bar(total: float, *, unit: str, done: float = 0) -> tqdm:
    """A progress bar on stderr; silent where that is no terminal.

    Args:
      total: units of work in all; 0 if unknown.
      unit: name of a unit. Bytes ("B") are scaled to MB and GB.
      done: units finished before.
    """
    return tqdm(
        total=total or None,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        leave=False,
        dynamic_ncols=True,
        disable=True if _muted else None,
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
    return (str(error).strip() or type(error).__name__).splitlines()[0]
