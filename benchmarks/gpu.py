"""What does a GPU make of it? Every figure that is predicted or not measured yet, in one call.

python benchmarks/gpu.py [--out gpu.json] [--minutes 9] [--only NAME ...] [--list] [--dry_run]

Each row (benchmarks/gpu_rows.py) is a process of its own that may take twice the time planned for
it, so that a crash costs its row alone. FILE.json is written with every measurement, beside it
FILE.md with the table and FILE.log with what the processes say. A dry run takes tiny shapes on any
device.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from gpu_rows import ROWS, Row
from harness import flags_only, make_parser, markdown, shown, table

from inl_jax.config import InputError
from inl_jax.console import first_line, say
from inl_jax.files import json_text, write_text
from inl_jax.terminal.command_line import exit_on_input_error, lines_on_stderr

NAMES = [row.name for row in ROWS]
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser("gpu", __doc__)
    parser.add_path("--out", default=Path("gpu.json"), help="gpu.json by default")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all rows; 9 by default")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the plan and measure nothing")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--row", choices=NAMES, help=argparse.SUPPRESS)  # of a child process
    with exit_on_input_error(), lines_on_stderr():
        flags = flags_only(parser, argv)
        rows = [row for row in ROWS if row.name == "device" or row.name in flags.only]
        if flags.list:
            print(table(plan(rows)))
        elif flags.row:
            measure_here(ROWS[NAMES.index(flags.row)], tiny=flags.dry_run)
        else:
            command = shlex.join(["python", parser.prog, *argv])
            found = measure(rows, flags, command)
            print(command, found[0]["case"], "", table(list(map(in_words, found))), sep="\n")


def plan(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """When each row starts if all take the time that is planned for them."""
    found, start = [], 0
    for row in rows:
        found.append({"row": row.name, "starts": start, "seconds": row.seconds, "what": row.what})
        start += row.seconds
    return [*found, {"row": "all", "starts": "", "seconds": start, "what": ""}]


def measure(rows: Sequence[Row], flags: argparse.Namespace, command: str) -> list[dict[str, Any]]:
    """Measures rows in their order while there is time, and writes what is found as it comes.

    Raises:
      InputError: there is no GPU.
    """
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * flags.minutes
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as cache,
        open(flags.out.with_suffix(".log"), "w+", errors="replace") as log,
    ):
        for row in rows:
            say(f"measuring {row.name}: {row.what}")
            planned, left = row.seconds, max(0, deadline - time.monotonic())
            if left == 0 or (left < planned and not flags.dry_run):
                why = f"not started: {planned} s are planned, {left:.0f} s are left"
                records = iter([{"failed": why}])
            else:
                # The first row waits until the machine has read JAX and CUDA from its disk.
                limit = left if flags.dry_run or not found else min(left, 2 * planned)
                records = measure_apart(row, limit, log, cache, tiny=flags.dry_run)
            for record in records:
                if not found and "failed" in record:
                    raise InputError(record["failed"])
                found.append({"row": row.name} | record)
                write_report(found, flags.out, command)
    return found


def write_report(found: list[dict[str, Any]], out: Path, command: str) -> None:
    head = {"command": command, "machine": found[0]["case"]}
    write_text(out, json_text(head | {"rows": found}, indent=1) + "\n")
    lines = [f"`{command}`: {head['machine']}", "", markdown([in_words(r) for r in found])]
    write_text(out.with_suffix(".md"), "\n".join(lines) + "\n")


def in_words(record: dict[str, Any]) -> dict[str, str]:
    """A record as a row of the table."""
    values = {name: x for name, x in record.items() if name not in ("row", "case")}
    found = ", ".join(f"{name} {shown(name, x)}" for name, x in values.items())
    return {"row": record["row"], "case": record.get("case", ""), "found": found}


# --- a process for each row


def measure_apart(
    row: Row, limit: float, log: TextIO, cache: str, *, tiny: bool
) -> Iterator[dict[str, Any]]:
    """Yields the records of a row from a process of its own, and why it failed if it did.

    Args:
      row: to measure.
      limit: seconds after which the process is killed.
      log: gets what the process says.
      cache: directory of compiled programs, in which the rows share what XLA learns by timing.
      tiny: whether it is a dry run.
    """
    xla_flags = [os.environ.get("XLA_FLAGS", ""), COMPILE_FAST if tiny else row.xla_flags]
    env = os.environ | {
        "XLA_FLAGS": " ".join(xla_flags).strip(),  # XLA takes a blank for the name of a file
        "XLA_CLIENT_MEM_FRACTION": ".95",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "",  # its old name: JAX refuses to start with both
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, __file__, "--row", row.name, *["--dry_run"] * tiny]
    log.seek(0, os.SEEK_END)
    begin, start = log.tell(), time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env=env
    ) as process:
        timer = threading.Timer(limit, process.kill)
        timer.start()
        for line in process.stdout:
            yield json.loads(line)
        process.wait()
        timer.cancel()
    if process.returncode == 0:
        return
    log.seek(begin)
    why = (log.read().strip().splitlines() or ["it said nothing"])[-1][:300]
    if time.monotonic() - start >= limit:
        why = f"stopped after {limit:.0f} s"
    elif process.returncode < 0:
        why = f"ended by signal {-process.returncode}: {why}"
    yield {"failed": why}


def measure_here(row: Row, *, tiny: bool) -> None:
    """Prints a line of JSON for each record of a row. If it fails, the last line says why."""
    with os.fdopen(os.dup(1), "w") as records:
        os.dup2(2, 1)  # what libraries print goes to the log
        try:
            for record in row.measure(tiny):
                print(json_text(record), file=records, flush=True)
        except InputError as error:
            sys.exit(first_line(error))
        except Exception as error:
            traceback.print_exc()
            sys.exit(f"{type(error).__name__}: {first_line(error)}")


if __name__ == "__main__":
    main()
