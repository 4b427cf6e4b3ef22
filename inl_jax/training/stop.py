"""SIGTERM, SIGHUP and Ctrl-C: when a run ends at once, when it finishes its update first."""

import contextlib
import os
import signal
import threading
from typing import Literal

_ANSWER = (
    b"\nstopping after this update, then saving; Ctrl-C again ends at once and loses what is not "
    b"saved\n"
)


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP came outside the loop: there was no update to finish and save."""


def stop_signals() -> list[int]:
    """The signals that stop a program: SIGINT, SIGTERM, and SIGHUP unless nohup ignores it."""
    found = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found


def exception_of(number: int) -> type[KeyboardInterrupt]:
    """What a stop signal raises: KeyboardInterrupt for Ctrl-C, `Stopped` for the others."""
    return KeyboardInterrupt if number == signal.SIGINT else Stopped


class StopRequest:
    """Catches SIGTERM, SIGHUP and Ctrl-C while it is open.

    At first a signal raises at once. While held, it is only noted: Orbax would mistake an exception
    raised while it reads for a bad checkpoint. In the loop it is noted too, so that the update is
    finished and saved; only a second Ctrl-C raises. A signal is always noted as well as raised,
    because Python drops what is raised in some callbacks, such as XLA's for the garbage collector;
    the loop then finds the note.
    """

    def __init__(self, *, answers: bool = True):
        """With `answers` the first Ctrl-C in the loop gets a line on stderr."""
        self._answers = answers
        self.requested: int | None = None  # the signal
        self._mode: Literal["raise", "held", "loop"] = "raise"

    def hold(self) -> None:
        """From here on nothing raises."""
        self._mode = "held"

    def release(self) -> None:
        """Ends `hold`, and raises what came meanwhile."""
        self._mode = "raise"
        if self.requested is not None:
            raise exception_of(self.requested)

    def enter_loop(self) -> None:
        """From here on the update is finished first."""
        self._mode = "loop"

    def __enter__(self) -> "StopRequest":
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._old[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number, frame):
        again, self.requested = self.requested is not None, number
        if self._mode == "loop" and not again and number == signal.SIGINT and self._answers:
            with contextlib.suppress(OSError):  # `say` might hold its lock: this is a handler
                os.write(2, _ANSWER)
        if self._mode == "raise" or (self._mode == "loop" and again and number == signal.SIGINT):
            raise exception_of(number)

    def __exit__(self, *exception):
        for number, handler in self._old.items():
            signal.signal(number, handler)
