"""The log of a tracker: what it prints, without secrets, and never so much that it fills a disk."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import BinaryIO

from inl_jax.redact import redact

LIMIT = 2**20  # bytes that one start of a tracker may add to its log

_LONGEST = 2**16  # bytes of a line that are redacted at once


def copy(printed: BinaryIO, log: BinaryIO) -> None:
    """Copies `printed` to `log`, redacted. Beyond `LIMIT` it is read and dropped.

    Args:
      printed: binary, buffered.
      log: binary, not buffered.
    """
    left = LIMIT
    while line := printed.readline(_LONGEST):
        if left:
            text = redact(line.decode(errors="replace")).encode()[:left]
            left -= len(text)
            with contextlib.suppress(OSError):  # the disk is full; the tracker must not wait
                log.write(text)


def capture() -> Callable[[], None]:
    """Copies what this process and its children print from now on to where stderr goes until now.

    Returns:
      A function for the end of this process, which waits until the last lines are copied.
    """
    log = os.fdopen(os.dup(2), "wb", buffering=0)
    reader, writer = os.pipe()
    for number in (1, 2):
        os.dup2(writer, number)
    os.close(writer)
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    printed = os.fdopen(reader, "rb")
    copying = threading.Thread(target=copy, args=(printed, log), daemon=True)
    copying.start()

    def finish() -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nowhere, number)  # closes the pipe; another thread may still print
        copying.join(1)  # children may keep the pipe open

    return finish
