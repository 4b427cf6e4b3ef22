"""The process of one tracker: it follows RUN/metrics.jsonl and sends each record once.

RUN/trackers/id.json    the run's id in W&B and trackio; a resumed run keeps it
RUN/trackers/NAME.json  the last step sent, of each kind of record, and the size of metrics.jsonl
                        when the tracker started
RUN/trackers/NAME.log   what the tracker printed
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inl_jax.console import first_line
from inl_jax.files import json_text, read_json, write_text
from inl_jax.redact import redact
from inl_jax.tracking import log
from inl_jax.tracking.services import HostedRun, TensorBoard
from inl_jax.training.metrics import KINDS, Record, kind, read_metrics
from inl_jax.training.trackers import TOLD, failed


class Tail:
    """What metrics.jsonl gains; all of it anew if the file is cut, removed or replaced."""

    def __init__(self, path: Path, offset: int):
        """Begins at byte `offset` of the file."""
        self._path, self._offset, self._rest, self._inode = path, offset, b"", None

    def read(self) -> list[Record]:
        """The new records and markers. Damaged lines are left out."""
        try:
            with open(self._path, "rb") as file:
                found = os.fstat(file.fileno())
                if found.st_size < self._offset or self._inode not in (None, found.st_ino):
                    self._offset, self._rest = 0, b""
                self._inode = found.st_ino
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            self._offset, self._rest = 0, b""
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        records = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                records.append(json.loads(line))
        return list(filter(_is_whole, records))


def _is_whole(record: Any) -> bool:
    """Whether this is a record of something at a step, or a marker: a disk may have damaged it."""
    if not isinstance(record, dict):
        return False
    of_a_step = type(record.get("step")) is int and any(of in record for of in KINDS)
    return of_a_step or type(record.get("resumed_from")) is int


def follow(
    name: str,
    run_dir: Path,
    ended: threading.Event,
    tell: Callable[[str], None],
    *,
    project: str,
    step: int,
    offset: int,
) -> None:
    """Sends the records of a run to tracker `name`, each once, until the run has `ended`.

    Args:
      name: the tracker.
      run_dir: the run directory.
      ended: set when metrics.jsonl is complete.
      tell: takes a line for the user.
      project: project of the run in W&B and trackio.
      step: update that the run resumed from.
      offset: size of metrics.jsonl at that time, in bytes.
    """
    state, metrics = run_dir / "trackers" / f"{name}.json", run_dir / "metrics.jsonl"
    sent = {of: n for of, n in read_json(state).items() if type(n) is int and n >= 0}
    tail, unseen = Tail(metrics, offset), Tail(metrics, sent.pop("offset", 0))
    parameters = {"config": read_json(run_dir / "config.json")}
    starts = read_json(run_dir / "env.json").get("starts")
    if isinstance(starts, list) and starts and isinstance(starts[-1], dict):
        parameters["environment"] = starts[-1]
    if name == "tensorboard":
        # It can forget: all is sent anew from the first step that is not surely complete, or that
        # the run has repeated since, perhaps without this tracker.
        repeated = [record["resumed_from"] for record in unseen.read() if "resumed_from" in record]
        start = min([step, *repeated, *(last - 1 for last in sent.values())]) if sent else -1
        sent = dict.fromkeys(sent, start)
        tracker = TensorBoard(run_dir, redact(parameters), start)
    else:
        tracker = HostedRun(name, run_dir, project, redact(parameters))
    tell(f"tracker {name}: {tracker.where}")

    def send(records: Sequence[Record]) -> None:
        for start in range(0, len(records), 20):
            for record in records[start : start + 20]:
                if record["step"] > sent.get(kind(record), -1):
                    try:
                        tracker.write(redact(record))
                    except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
                        tell(f"tracker {name}: a record of update {record['step']} is damaged")
                    sent[kind(record)] = record["step"]
            tracker.flush()
            write_text(state, json_text(sent | {"offset": offset}))

    send(read_metrics(run_dir, up_to=step))
    last = False
    while not last:
        last = ended.wait(1)
        send([record for record in tail.read() if "step" in record])
    tracker.close()


def main() -> None:
    """The process of one tracker."""
    name, run_dir, arguments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends with the run
        signal.signal(number, signal.SIG_IGN)
    stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
    finish_log = log.capture()

    def tell(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the run may have been killed
            stdout.write(redact(line) + "\n")

    if name == "tensorboard":
        sys.modules["torch"] = None  # tensorboardX would load it, for nothing
    ended, grace = threading.Event(), arguments.pop("grace")

    def watch() -> None:
        sys.stdin.read()  # ends with the run, even if that was killed
        ended.set()
        time.sleep(grace)
        tell(failed(name, f"not finished {grace} seconds after the run"))
        finish_log()
        os._exit(TOLD)

    threading.Thread(target=watch, daemon=True).start()
    code = 1
    try:
        with open(run_dir / "trackers" / f"{name}.lock", "a") as lock:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # one of a killed run may still be sending
            follow(name, run_dir, ended, tell, **arguments)
        code = TOLD
    except BaseException as error:  # also SystemExit
        tell(failed(name, f"{type(error).__name__}: {first_line(error)}"))
        code = TOLD
        traceback.print_exc()
    finally:
        finish_log()
        os._exit(code)  # a tracker's own work at exit could hang


if __name__ == "__main__":
    main()
