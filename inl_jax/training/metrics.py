"""Numbers about a run: arithmetic, throughput, and where they are written."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from inl_jax.parallel import processes


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB"


def count(number: float) -> str:
    """A parameter or token count for people: 1.70B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds for people: 1d 02h, 3h 04m, 5m 06s."""
    seconds = int(seconds)
    for large, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if seconds >= size:
            return f"{seconds // size}{large} {seconds % size // part:02d}{small}"
    return f"{seconds // 60}m {seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def perplexity(loss: float) -> float:
    """`exp(loss)`, infinite where that overflows."""
    return math.inf if loss >= 700 else math.exp(loss)


class MetricsLog:
    """Records of a run: one JSON object a line, and the same on the console.

    On a terminal a progress line is rewritten in place between the log lines. With several
    processes only the first writes anything.
    """

    def __init__(self, run_dir: str | Path):
        self._path = Path(run_dir) / "metrics.jsonl"
        self._file = None
        self._first = processes.first()
        self._terminal = self._first and sys.stdout.isatty()
        self._shown = 0.0

    def say(self, line: str) -> None:
        """A line for the console only."""
        if not self._first:
            return
        print(f"\r\033[K{line}" if self._terminal else line, flush=True)

    def write(self, record: dict[str, Any], line: str) -> None:
        """One record to the file, and its line to the console."""
        if not self._first:
            return
        if self._file is None:
            torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
            self._file = open(self._path, "a", buffering=1)
            if torn:  # by a crash; the next record must not be lost with it
                self._file.write("\n")
        self._file.write(json.dumps(record) + "\n")
        self.say(line)

    def progress(self, step: int, num_steps: int, loss: float) -> None:
        """Rewrites the progress line of a terminal, a few times a second; elsewhere nothing."""
        now = time.perf_counter()
        if not self._terminal or now - self._shown < 0.2:
            return
        self._shown = now
        filled = 30 * step // num_steps
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r\033[K[{bar}] {step}/{num_steps}  loss {loss:.4f}", end="", flush=True)

    def close(self) -> None:
        """Ends the progress line and the file."""
        if self._terminal:
            print("\r\033[K", end="", flush=True)
        if self._file is not None:
            self._file.close()


def read_metrics(run_dir: str | Path, *, up_to: float = math.inf) -> list[dict[str, Any]]:
    """The records of a run in order of steps, at most one of each kind for a step.

    A resumed run writes some steps twice; the later record stands. A last line cut short by a
    crash is passed over.
    """
    path = Path(run_dir) / "metrics.jsonl"
    latest = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError):
            continue
        if step <= up_to:
            latest[step, "validation_loss" in record] = record
    return [latest[key] for key in sorted(latest)]


class StepTimer:
    """Seconds per update, and the share of them that went into waiting for inputs."""

    def __init__(self):
        self.start(0)

    def start(self, step: int) -> None:
        """Counting begins after `step`."""
        self._since, self._step, self._waited = time.perf_counter(), step, 0.0

    def inputs(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Passes `batches` on, counting the time until each of them is there.

        The device waits less than that: in the meantime it has an update in hand.
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
        """Seconds per update and the share waited since the last start or lap."""
        elapsed = time.perf_counter() - self._since
        results = elapsed / max(1, step - self._step), self._waited / max(elapsed, 1e-9)
        self.start(step)
        return results
