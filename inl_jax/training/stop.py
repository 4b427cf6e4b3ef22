"""SIGTERM and Ctrl-C: when a run is ended at once, and when an update is finished first."""

import signal
import threading
from typing import Literal

EXIT_FAILED = 1
EXIT_MISTAKE = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: the same command may be run again, and resumes what was saved
EXIT_CTRL_C = 130


class Stopped(KeyboardInterrupt):
    """SIGTERM came outside the loop: there was no update to finish and save."""


class StopRequest:
    """Catches SIGTERM and Ctrl-C for as long as it is open.

    At first they raise at once. While held they are noted alone: Orbax would take what is raised
    while it reads for a bad checkpoint. In the loop they are noted, for the update to be finished
    and saved; only a second Ctrl-C raises. Python drops what is raised in some callbacks, as XLA's
    for the garbage collector; the loop finds it noted.
    """

    def __init__(self):
        self.requested: int | None = None  # the signal
        self._mode: Literal["raise", "held", "loop"] = "raise"

    def hold(self) -> None:
        """From here on nothing raises."""
        self._mode = "held"

    def release(self) -> None:
        """Ends `hold`; raises what came meanwhile."""
        self._mode = "raise"
        if self.requested is not None:
            self._raise()

    def enter_loop(self) -> None:
        """From here on updates are finished first."""
        self._mode = "loop"

    def __enter__(self) -> "StopRequest":
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number, frame):
        again, self.requested = self.requested is not None, number
        if self._mode == "raise" or (self._mode == "loop" and again and number == signal.SIGINT):
            self._raise()

    def _raise(self):
        raise Stopped if self.requested == signal.SIGTERM else KeyboardInterrupt

    def __exit__(self, *exception):
        for number, handler in self._old.items():
            signal.signal(number, handler)
