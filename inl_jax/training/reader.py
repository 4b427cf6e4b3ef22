"""Reading in a thread of its own, so that the thread that trains never waits without an end."""

import queue
import threading
from collections.abc import Iterator
from typing import Any


class Reader:
    """Reads batches ahead; a wait for the next one may be given up."""

    def __init__(self, batches: Iterator[Any]):
        """Starts reading. The order of the batches stays."""
        self._ready: queue.Queue = queue.Queue(maxsize=1)
        self._closed = False
        # A daemon: a read that never returns does not keep the process.
        threading.Thread(target=self._read, args=(batches,), daemon=True, name="reader").start()

    def _read(self, batches):
        try:
            for batch in batches:
                self._ready.put((batch, None))
                if self._closed:
                    return
            self._ready.put((None, StopIteration()))
        except BaseException as error:  # raised where the batch is waited for
            self._ready.put((None, error))

    def next(self, seconds: float) -> Any:
        """The next batch.

        Args:
          seconds: to wait for it.

        Raises:
          TimeoutError: it has not come; it is not lost.
          StopIteration: there are no more.
          BaseException: what reading raised.
        """
        try:
            batch, error = self._ready.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return batch

    def close(self) -> None:
        """Ends the thread once it has read the batch that it is at. Does not wait for it."""
        self._closed = True
        while not self._ready.empty():
            self._ready.get_nowait()
