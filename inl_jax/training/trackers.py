"""Trackers: TensorBoard, W&B and trackio, which also show the records of a run.

Each tracker is a process of its own (inl_jax/tracking) that follows RUN/metrics.jsonl. Training
only starts it, and gives it some seconds at the end: what fails, hangs or fills a disk there costs
one line.
"""

import importlib.util
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from inl_jax.checks import require
from inl_jax.console import first_line, say
from inl_jax.files import json_text, read_json, write_text
from inl_jax.parallel import processes
from inl_jax.redact import redact

GRACE = 20  # seconds that the trackers have to finish after the run
TOLD = 3  # exit code of a tracker that has finished, or said why not; a package may exit with 0

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check_trackers(names: Iterable[str]) -> None:
    """Checks that the packages of the trackers are installed. Imports none of them.

    Raises:
      InputError: one is missing; the line says how to install it.
    """
    for name in names:
        found = importlib.util.find_spec(_PACKAGES[name])
        # The folder ./wandb, which W&B itself makes, is found too: as a package without a file.
        require(
            found is not None and found.origin is not None,
            f"track={name}: {_PACKAGES[name]} is not installed: pip install 'inl_jax[{name}]'",
        )


class Trackers:
    """The trackers of a run: processes that process 0 starts. Other processes start none."""

    def __init__(self, names: Iterable[str], run_dir: str | Path, *, project: str, step: int):
        """Starts the trackers. Never raises.

        Args:
          names: which ones.
          run_dir: the run directory. config.json and env.json in it become parameters.
          project: project of the run in W&B and trackio.
          step: update that the run starts or resumes from; the log has been told.
        """
        self._running: list[tuple[subprocess.Popen, threading.Thread]] = []
        for name in dict.fromkeys(names) if processes.first() else ():
            try:
                process = _start(name, Path(run_dir), project, step)
            except OSError as error:
                say(failed(name, f"{type(error).__name__}: {first_line(error)}"))
                continue
            watcher = threading.Thread(target=_watch, args=(name, process), daemon=True)
            watcher.start()
            self._running.append((process, watcher))

    def close(self) -> None:
        """Lets the trackers send what is left. Returns after `GRACE` seconds and a few at most."""
        for process, _ in self._running:
            process.stdin.close()
        deadline = time.monotonic() + GRACE + 5
        for process, watcher in self._running:
            watcher.join(max(0, deadline - time.monotonic()))
            if watcher.is_alive():  # it is stuck where it cannot watch the time itself
                process.kill()
                watcher.join(2)


def _start(name: str, run_dir: Path, project: str, step: int) -> subprocess.Popen:
    folder, metrics = run_dir / "trackers", run_dir / "metrics.jsonl"
    folder.mkdir(exist_ok=True)
    if not isinstance(read_json(folder / "id.json").get("id"), str):
        stem = re.sub(r"[^\w.-]", "-", run_dir.resolve().name)[:40]
        write_text(folder / "id.json", json_text({"id": f"{stem}-{secrets.token_hex(3)}"}))
    offset = metrics.stat().st_size if metrics.exists() else 0
    arguments = {"project": project, "step": step, "offset": offset, "grace": GRACE}
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    program = [sys.executable, "-P", "-m", "inl_jax.tracking.follow"]
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen(
            [*program, name, str(run_dir), json_text(arguments)],
            stdin=subprocess.PIPE,  # its end tells the tracker that the run has ended
            stdout=subprocess.PIPE,  # lines to say
            stderr=log,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for training
        )


def _watch(name: str, process: subprocess.Popen) -> None:
    speaker = threading.Thread(target=_say_lines, args=(process.stdout,), daemon=True)
    speaker.start()
    code = process.wait()
    speaker.join(1)  # children of the tracker may keep the pipe open
    if code != TOLD:
        say(failed(name, f"its process ended with code {code}"))


def _say_lines(lines: Iterable[str]) -> None:
    for line in lines:
        say(line.rstrip("\n"))


def failed(name: str, reason: str) -> str:
    """The line about a tracker that is given up."""
    reason = redact(reason).rstrip(".")
    return f"WARNING: tracker {name}: {reason}; it gets no more records, training goes on"
