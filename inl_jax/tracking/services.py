"""TensorBoard, W&B and trackio: how each takes a record, and the names of its numbers."""

import importlib
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inl_jax.files import read_json
from inl_jax.training.metrics import Record

_TABLE_HEAD = ("| field | value |", "|---|---|")
_GIB = 2**-30
_NAMES = {  # key of a record: name in the trackers, factor
    "loss": ("train/loss", 1),
    "perplexity": ("train/perplexity", 1),
    "grad_norm": ("train/grad_norm", 1),
    "learning_rate": ("train/lr", 1),
    "tokens": ("train/tokens", 1),
    "epoch": ("train/epoch", 1),
    "tokens_per_second": ("perf/tokens_per_second", 1),
    "mfu": ("perf/mfu", 1),
    "seconds_per_step": ("perf/step_seconds", 1),
    "input_wait": ("perf/input_wait", 1),
    "peak_memory": ("mem/peak_gib", _GIB),
    "gpu_util": ("gpu/util", 1),
    "gpu_memory": ("gpu/memory", _GIB),
    "gpu_temperature": ("gpu/temperature", 1),
    "gpu_watts": ("gpu/watts", 1),
    "energy_kwh": ("gpu/energy_kwh", 1),
    "validation_loss": ("val/loss", 1),
    "validation_perplexity": ("val/perplexity", 1),
    "validation_bits_per_byte": ("val/bits_per_byte", 1),
    "gap": ("val/gap", 1),
}


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record by their names in the trackers; those that are not finite left out.

    Of the integrator's dynamics: mean, lowest and highest over the layers, at the last iteration.
    """
    found = {
        name: record[key] * factor
        for key, (name, factor) in _NAMES.items()
        if record.get(key) is not None
    }
    for source, values in record.get("sources", {}).items():
        found |= {f"val/{key}/{source}": v for key, v in values.items() if v is not None}
    for quantity, layers in record.get("dynamics", {}).items():
        last = [layer[-1] for layer in layers if layer and layer[-1] is not None]
        if last:
            found[f"dynamics/{quantity}/mean"] = sum(last) / len(last)
            found[f"dynamics/{quantity}/lowest"] = min(last)
            found[f"dynamics/{quantity}/highest"] = max(last)
    return {name: value for name, value in found.items() if math.isfinite(value)}


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, run_dir: Path, parameters: dict[str, Any], step: int):
        """Opens a new file, which hides all points above `step` in the older ones."""
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter  # needs no queue, raises at once
        from tensorboardX.proto import event_pb2, summary_pb2

        self._text, self._events, self._summaries = summary.text, event_pb2, summary_pb2
        self.where = f"tensorboard --logdir {run_dir.parent}"
        # Two files of one second would share a name; TensorBoard reads them in order of names.
        self._writer = EventsWriter(str(run_dir / "events"), f".{time.time_ns()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step + 1, time.time(), session_log=start)
        for title, values in parameters.items():
            rows = [f"| {key} | {_cell(value)} |" for key, value in _flat(values)]
            self._add_text(step + 1, time.time(), title, "\n".join([*_TABLE_HEAD, *rows]))

    def write(self, record: Record) -> None:
        """Adds the points and the samples of a record, at the time of the record."""
        step, moment = record["step"], record.get("time", time.time())
        points = [
            self._summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in scalars(record).items()
        ]
        self._add(step, moment, summary=self._summaries.Summary(value=points))
        for i, sample in enumerate(record.get("samples", ()), start=1):
            text = "\n\n".join(
                f"**{title}**\n\n" + "\n".join(f"    {line}" for line in part.splitlines())
                for title, part in sample.items()
            )
            self._add_text(step, moment, f"samples/{i}", text)

    def _add_text(self, step: int, moment: float, title: str, markdown: str) -> None:
        summary = self._text(title, markdown)
        summary.value[0].tag = title  # tensorboardX adds /text_summary to it
        self._add(step, moment, summary=summary)

    def _add(self, step: int, moment: float, **content: Any) -> None:
        self._writer.write_event(self._events.Event(step=step, wall_time=moment, **content))

    def flush(self) -> None:
        """Writes to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


class HostedRun:
    """A run in W&B or trackio, whose modules share `init`, `log` and `finish`."""

    def __init__(self, name: str, run_dir: Path, project: str, parameters: dict[str, Any]):
        """Opens the run with the id of `run_dir`, new or resumed."""
        self._module, self._wandb = importlib.import_module(name), name == "wandb"
        run_id = read_json(run_dir / "trackers" / "id.json")["id"]
        common = {"project": project, "name": run_id, "resume": "allow", "config": parameters}
        if self._wandb:
            settings = {"console": "off", "disable_git": True, "disable_code": True}
            run = self._module.init(
                **common, id=run_id, dir=str(run_dir / "trackers"), settings=settings
            )
            # W&B drops what is logged below its own last step, such as a late evaluation.
            run.define_metric("*", step_metric="update")
            self.where = run.url or f"wandb sync {run_dir}/trackers/wandb/offline-run-*"
        else:
            run = self._module.init(**common, auto_log_gpu=False, auto_log_cpu=False)
            self.where = run.url or f"trackio show --project {project}"

    def write(self, record: Record) -> None:
        """Hands over the numbers of a record, and its samples as a table."""
        values: dict[str, Any] = scalars(record)
        if record.get("samples"):
            columns = list(record["samples"][0])
            rows = [[sample[column] for column in columns] for sample in record["samples"]]
            values["samples"] = self._module.Table(columns=columns, data=rows)
        if self._wandb:
            self._module.log(values | {"update": record["step"]})
        else:
            self._module.log(values, step=record["step"])

    def flush(self) -> None:
        """W&B and trackio send from threads of their own."""

    def close(self) -> None:
        """Waits until everything is sent."""
        self._module.finish()


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
