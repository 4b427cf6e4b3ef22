"""Says when training makes no progress and what it waits for, and ends it at a limit."""

import collections
import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from inl_jax import console
from inl_jax.config import TrainConfig
from inl_jax.failures import MachineFailure, Stalled
from inl_jax.parallel import processes
from inl_jax.training.reader import Reader
from inl_jax.training.stop import StopRequest, exception_of

LEAST_SECONDS = 60  # a shorter wait is no stall
FIRST_SECONDS = 1800  # the same for what has not been done before, and may compile
OTHERS_SECONDS = 5  # for a process that waits for input to end all, and to name itself
TICK = 0.5  # seconds between two looks of the watching thread
POLL = 0.1  # seconds between two looks for a reason to end, while there is no input
UPDATE = "update"


def end_process(message: str) -> None:
    """Ends this process, whose main thread hangs, and all others with it."""
    processes.end(Stalled.exit_code, f"error: {message}")
    console.flush()
    os._exit(Stalled.exit_code)


class Watchdog:
    """Watches from a thread of its own that the main thread makes progress.

    A wait is a stall if it is longer than `factor` times the median of its kind, and than
    `LEAST_SECONDS`: the stacks of all threads then go to stderr, with a line. The watching thread
    counts the time by its looks, so that no laptop asleep and no stopped process has waited.
    """

    def __init__(
        self, *, factor: float, limit: float, end: Callable[[str], None] = end_process
    ) -> None:
        """Starts the thread, which has nothing to watch yet.

        Args:
          factor: see above; 0 says nothing.
          limit: seconds without progress after which training ends, or twice the usual if that is
            more; 0 never.
          end: called in the watching thread, with a message, if the main thread hangs. While that
            waits for input it does not: `inputs` ends.
        """
        self._factor, self._limit, self._end = factor, limit, end
        self._usual = collections.defaultdict(lambda: collections.deque(maxlen=128))
        self._kind, self._at_input = "", False
        self.gave_up = ""  # why `inputs` ended early, if nobody asked for it
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._start()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def _start(self) -> None:
        with self._lock:
            self._since, self._waited, self._told = time.monotonic(), 0.0, False
            self._expired = ""  # what was said when the wait for input came to its limit

    def progress(self) -> None:
        """Notes that what is watched got on, as by an update."""
        self._usual[self._kind].append(time.monotonic() - self._since)
        self._start()

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Watches a block: updates, or what comes between them, such as a save."""
        before, self._kind = self._kind, kind
        self._start()
        try:
            yield
            self.progress()
        finally:
            self._kind = before
            self._start()

    @contextlib.contextmanager
    def beside(self, what: str, step: int) -> Iterator[None]:
        """Watches what is computed beside the training; its failure is one line.

        A failure ends nothing, but if there are several processes: the others wait for this one.

        Raises:
          MachineFailure: the block failed on one of several processes.
        """
        with self.during(what):
            if jax.process_count() == 1:
                with console.aside(f"{what} at update {step}"):
                    yield
                return
            try:
                yield
            except Exception as error:
                reason = f"{type(error).__name__}: {console.first_line(error)}"
                raise MachineFailure(
                    f"process {jax.process_index()}: {what} at update {step} failed ({reason}); "
                    "the same command resumes from the last checkpoint"
                ) from error

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yields `items`. To be done with one is progress."""
        for item in items:
            yield item
            self.progress()

    def inputs(self, reader: Reader, stop: StopRequest) -> Iterator[Any]:
        """Yields batches. Ends early if the next one does not come and training is to end.

        Several processes cannot save then: others may wait in the update of that batch.

        Raises:
          Stalled: one of several processes waited to the limit.
          Stopped, KeyboardInterrupt: one of several processes is to stop, and no batch comes.
        """
        several, stopping = jax.process_count() > 1, 0.0
        while True:
            try:
                self._at_input = True
                batch = reader.next(POLL)
            except StopIteration:
                return
            except TimeoutError:
                stopping += POLL * (stop.requested is not None)
                self.gave_up = self._expired
                if not self.gave_up and stopping <= several * OTHERS_SECONDS:
                    continue
                if not several:
                    return
                if self.gave_up:
                    raise Stalled(f"{self.gave_up}; the same command resumes") from None
                console.complain(describe(UPDATE, True, self._waited, 0))
                raise exception_of(stop.requested) from None
            finally:
                self._at_input = False
            yield batch

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(TICK):
            now = time.monotonic()
            with self._lock:
                self._waited += min(now - before, 2 * TICK)
                waited, told, before = self._waited, self._told, now
            if self._kind:
                self._look(self._kind, self._at_input, waited, told)

    def _look(self, kind: str, at_input: bool, waited: float, told: bool) -> None:
        usual = statistics.median(self._usual[kind] or [0.0])
        least = LEAST_SECONDS if at_input or usual else FIRST_SECONDS
        limit = max(self._limit, 2 * usual, 0 if at_input or usual else FIRST_SECONDS)
        if not at_input:
            limit += OTHERS_SECONDS * (jax.process_count() > 1)
        over = self._limit > 0 and waited > limit
        if not over and (told or not self._factor or waited <= max(least, self._factor * usual)):
            return
        what = describe(kind, at_input, waited, usual)
        if not told:
            self._told = True
            with contextlib.suppress(OSError, ValueError):  # stderr may be closed
                faulthandler.dump_traceback(file=2)
            console.complain(f"WARNING: {what}; the stacks of all threads are above")
        if over and at_input:
            self._expired = what
        elif over:
            self._end(
                f"{what}, the limit being stall_limit={self._limit:g}; nothing was saved after the "
                "last checkpoint, from which the same command resumes"
            )

    def stalled(self, step: int, config: TrainConfig) -> Stalled:
        """What ends a run that waits for input, once the state after update `step` is saved."""
        saved = f"update {step} is saved in {config.run_dir}" if step else "there is no update yet"
        return Stalled(
            f"{self.gave_up}, the limit being stall_limit={self._limit:g}; {saved}: see to the "
            f"disk of data.cache_dir={config.data.cache_dir}, then the same command resumes"
        )

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()


def describe(kind: str, at_input: bool, waited: float, usual: float) -> str:
    """What waits how long, and for what; of several processes, which one.

    Args:
      kind: as for `Watchdog.during`.
      at_input: whether it waits for a batch.
      waited: seconds.
      usual: seconds; 0 if unknown.
    """
    several = jax.process_count() > 1
    who = f"process {jax.process_index()} of {jax.process_count()}: " if several else ""
    what = "input" if at_input else "the devices" if kind == UPDATE else kind
    what += " or other processes" if several and not at_input else ""
    usually = f" (usually {usual:.2g} s)" if usual else ""
    return f"{who}no progress for {waited:.0f} s{usually}, waiting for {what}"
