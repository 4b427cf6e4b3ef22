"""Records of a run: one JSON object a line in RUN/metrics.jsonl, and one console line each.

The console line is made *from* the record. Records count in optimizer updates.
"""

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inl_jax.console import count, duration, plural, progress_bar, reason, say, size
from inl_jax.files import append_lines, json_text, read_bytes
from inl_jax.parallel import processes

Record = dict[str, Any]

# What a record is of holds one of these: an update, an evaluation, the integrator, samples.
KINDS = ("loss", "validation_loss", "dynamics", "samples")


def perplexity(loss: float) -> float:
    """`exp(loss)`, infinite if that overflows."""
    return math.inf if loss >= 700 else math.exp(loss)


def update_record(
    values: dict[str, Any],
    step: int,
    num_steps: int,
    seconds_per_step: float,
    tokens_per_second: float,
    input_wait: float,
) -> Record:
    """The record of an update, from the metrics of `train_step` as numbers.

    `loss` is that of this update alone. `input_wait` is the share of the time since the last record
    that the host waited for data. `seconds_left` leaves out evaluations, saves and samples.
    """
    return {
        "step": step,
        "num_steps": num_steps,
        "loss": values["loss"],
        "perplexity": perplexity(values["loss"]),
        "learning_rate": values["learning_rate"],
        "grad_norm": values["grad_norm"],
        "seconds_per_step": seconds_per_step,
        "tokens_per_second": tokens_per_second,
        "input_wait": input_wait,
        "seconds_left": seconds_per_step * (num_steps - step),
        "skipped": values["skipped"],
    }


def kind(record: Record) -> str:
    """What a record is of: the one of `KINDS` that it holds."""
    return next(key for key in KINDS if key in record)


def console_lines(record: Record) -> list[str]:
    """A record for people."""
    start = f"update {record['step']}/{record['num_steps']}  "
    return [start + line for line in _LINES[kind(record)](record)]


def _sample_lines(record: Record) -> list[str]:
    def quoted(text: str) -> str:
        return text if len(text) <= 160 else f"{text[:157]}..."

    return [
        f"sample, {how}: {quoted(sample['prompt'] + sample[way])!r}"
        for sample in record["samples"]
        for how, way in (("likeliest", "greedy"), ("drawn", "sampled"))
    ]


def _dynamics_line(record: Record) -> list[str]:
    found = record["dynamics"]
    L = len(found["rms_error"])
    rms = [f"{sum(of_layers) / L:.3f}" for of_layers in zip(*found["rms_error"], strict=True)]
    way = rms[0] if len(rms) == 1 else f"{rms[0]} -> {rms[-1]}"
    stiffness = max(max(layer) for layer in found["stiffness"])
    return [f"integrator: rms(x - mu) {way}, largest dt gate beta {stiffness:.3f}"]


def _evaluation_line(record: Record) -> list[str]:
    line = (
        f"validation loss {record['validation_loss']:.4f}  "
        f"ppl {record['validation_perplexity']:.2f}  "
        f"{record['validation_bits_per_byte']:.4f} bits/byte  "
        f"({record['validation_tokens']:,} tokens)"
    )
    if "gap" in record:
        line += (
            f"  gap {record['gap']:+.2f} to the mean training loss {record['train_loss']:.4f}: "
            f"{record['verdict']}"
        )
    line += "  best so far" if record.get("best") else ""
    return [
        line + (f"  patience left {record['patience_left']}" if "patience_left" in record else "")
    ]


def _update_line(record: Record) -> list[str]:
    line = (
        f"loss {record['loss']:.4f}  ppl {record['perplexity']:.2f}  "
        f"lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.3f}  "
        f"{1000 * record['seconds_per_step']:.0f} ms  {count(record['tokens_per_second'])} tok/s"
    )
    if "mfu" in record:
        line += f"  MFU {100 * record['mfu']:.1f}%"
    if "peak_memory" in record:
        line += f"  peak {size(record['peak_memory'])}"
    if "gpu_util" in record:
        line += (
            f"  GPU {100 * record['gpu_util']:.0f}% {record['gpu_temperature']:.0f} °C "
            f"{record['gpu_watts']:.0f} W"
        )
    if record["input_wait"] > 0.01:
        line += f"  {100 * record['input_wait']:.0f}% waiting for data"
    if record["skipped"]:
        line += f"  {record['skipped']} skipped"
    return [f"{line}  {duration(record['seconds_left'])} left"]


_LINES = dict(
    zip(KINDS, (_update_line, _evaluation_line, _dynamics_line, _sample_lines), strict=True)
)


class MetricsLog:
    """The records of one run, written by process 0, and its progress bar."""

    def __init__(self, run_dir: str | Path, *, on_record: Callable[[Record], None] | None = None):
        """Opens the log of a run.

        Args:
          run_dir: the run directory.
          on_record: called with each record on process 0, after it is written. What it raises ends
            the run.
        """
        self._path = Path(run_dir) / "metrics.jsonl"
        self._on_record = on_record
        self._unwritten: deque[str] = deque()  # lines that the disk has refused so far
        self._bar = None

    def write(self, record: Record) -> None:
        """Writes one record to the file and its lines to the console."""
        if not processes.first():
            return
        self._append(record)
        for line in console_lines(record):
            say(line)
        if self._on_record is not None:
            self._on_record(record)

    def resume_from(self, step: int) -> None:
        """Marks records above `step` as abandoned: the run resumes from there.

        They stay in the file; `read_metrics` drops them.
        """
        if processes.first() and any(r["step"] > step for r in read_metrics(self._path.parent)):
            self._append({"resumed_from": step})

    def _append(self, record: Record) -> None:
        """Writes a line. What cannot be written is kept for the next call: training goes on."""
        refused = len(self._unwritten)
        self._unwritten.append(json_text(record) + "\n")
        try:
            self._write_all()
        except OSError as error:
            if not refused:
                say(
                    f"WARNING: {self._path} cannot be written ({reason(error)}); training goes on, "
                    "and its records are written once that works again"
                )
            return
        if refused:
            say(f"{self._path} can be written again; no record is lost")

    def _write_all(self) -> None:
        while self._unwritten:
            append_lines(self._path, self._unwritten[0])
            self._unwritten.popleft()

    def progress(self, step: int, num_steps: int, loss: float) -> None:
        """Moves the progress bar of a terminal to `step`."""
        if self._bar is None:
            self._bar = progress_bar(num_steps, unit="update", done=step - 1)
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Ends the progress bar, and says how many records were not written."""
        if self._bar is not None:
            self._bar.close()
        try:
            self._write_all()
        except OSError as error:
            lost = plural(len(self._unwritten), "record")
            say(f"WARNING: {self._path} lacks the last {lost} ({reason(error)})")


def read_metrics(run_dir: str | Path, *, up_to: float = math.inf) -> list[Record]:
    """The records of a run in order of steps, at most one of each kind for a step.

    A resumed run repeats some steps: the later record stands, and records above the step that it
    resumed from are dropped, because they belong to a branch that was abandoned. A last line that a
    crash cut short is ignored. A null is a number that was not finite, and read as NaN. A file that
    cannot be read has no records.
    """
    latest: dict[tuple[int, str], Record] = {}
    order = {of: i for i, of in enumerate(KINDS)}
    try:
        text = read_bytes(Path(run_dir) / "metrics.jsonl").decode(errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            if "resumed_from" in record:
                start = record["resumed_from"]
                latest = {key: found for key, found in latest.items() if key[0] <= start}
                continue
            record = {k: math.nan if value is None else value for k, value in record.items()}
            if _is_sound(record) and record["step"] <= up_to:
                latest[record["step"], kind(record)] = record
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError):
            continue
    return [latest[step, of] for step, of in sorted(latest, key=lambda k: (k[0], order[k[1]]))]


def _is_sound(record: Record) -> bool:
    """Whether the values that decide something are of their types: a disk may have damaged them."""
    types = {"loss": float, "validation_loss": float, "dynamics": dict, "samples": list}
    of = kind(record)
    return isinstance(record["step"], int) and isinstance(record[of], types[of])


def latest(records: list[Record], key: str) -> float:
    """The number under `key` in the last record that has one, 0 if none has."""
    found = (record.get(key) for record in reversed(records))
    return next((v for v in found if isinstance(v, int | float) and math.isfinite(v)), 0.0)
