"""How long updates take, and how much of that is waiting for input."""

import time
from collections.abc import Iterable, Iterator
from typing import Any


class StepTimer:
    """Seconds per update, and the share of them spent waiting for input."""

    def __init__(self):
        self.start(0)

    def start(self, step: int) -> None:
        """Starts timing after update `step`."""
        self._since, self._step, self._waited = time.perf_counter(), step, 0.0

    def inputs(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields `batches`, and counts the time that the host waits for each.

        The device waits less: it still has the previous update to do.
        """
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def lap(self, step: int) -> tuple[float, float]:
        """(seconds per update, share of them waited for input) since the last start or lap."""
        elapsed = time.perf_counter() - self._since
        results = elapsed / max(1, step - self._step), self._waited / max(elapsed, 1e-9)
        self.start(step)
        return results
