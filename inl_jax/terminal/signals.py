"""SIGTERM, SIGHUP and Ctrl-C outside the training loop: one line and a documented exit code."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from inl_jax.failures import EXIT_CTRL_C, EXIT_INTERRUPTED
from inl_jax.training.stop import Stopped, exception_of, stop_signals

PATIENCE = 5  # seconds for a verb to remove its temporary files

_started = False
_held = False  # signals are noted alone
_noted: int | None = None


def end_at_once() -> None:
    """From here on a signal ends the process at once, with one line.

    For imports: an exception in the middle of one leaves modules half made, and C++ crashes.
    """
    global _started
    _started = True
    for number in stop_signals():
        signal.signal(number, leave)


def unwind(*, patience: float | None = PATIENCE) -> None:
    """From here on, after the imports, the first signal raises; a second one ends at once.

    Raises `Stopped` for SIGTERM and SIGHUP, KeyboardInterrupt for Ctrl-C, so that temporary files
    are removed on the way out. Without `end_at_once` before, as in a test, this does nothing.

    Args:
      patience: seconds after which the process ends even if nothing has been raised: Python runs a
        handler only after a call into C++, such as a compilation. None waits for ever.
    """
    if not _started:
        return

    def stop(number, frame):
        global _noted
        if _held:
            _noted = number
            return
        for again in stop_signals():
            signal.signal(again, leave)
        raise exception_of(number)

    for number in stop_signals():
        signal.signal(number, stop)
    sys.unraisablehook = _dropped
    if patience is None:
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)  # written by C, at once, whatever Python is doing

    def watch():
        number = os.read(read_end, 1)[0]
        while number not in stop_signals():
            number = os.read(read_end, 1)[0]
        time.sleep(patience)
        leave(number)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal ends the process after the block: Orbax would take what raises in it for damage."""
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False
        if _noted is not None:
            leave(_noted)


def _dropped(error) -> None:
    """Ends the process if Python dropped what `stop` raised, as in XLA's callback for the GC.

    Once `train` catches signals itself, it has noted the signal and needs no exception.
    """
    if "Event loop is closed" in str(error.exc_value):
        pass  # Orbax closes the loop of a save that fails before all its writes have ended
    elif not issubclass(error.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(error)
    elif signal.getsignal(signal.SIGTERM) is leave:
        leave(signal.SIGTERM if issubclass(error.exc_type, Stopped) else signal.SIGINT)


def leave(number: int, frame=None) -> None:
    """Ends the process because signal `number` came: one line on stderr and the exit code."""
    if threading.current_thread() is threading.main_thread():
        ignore()  # one line, also for two signals
    terminated = number != signal.SIGINT
    with contextlib.suppress(Exception):  # the signal may have come in the middle of a flush
        sys.stdout.flush()
    line = "terminated" if terminated else "interrupted"
    try:
        os.write(2, f"{line}; nothing was saved, the same command may be run again\n".encode())
    finally:  # stderr may be closed, as after a lost connection
        os._exit(EXIT_INTERRUPTED if terminated else EXIT_CTRL_C)


def ignore() -> None:
    """From here on a signal changes nothing: the exit code is decided."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
