"""A run as it lies on the disk, read without loading its weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inl_jax.config import InputError
from inl_jax.console import plural
from inl_jax.files import user_path
from inl_jax.training.metrics import Record, read_metrics
from inl_jax.watch.cleaning import clean_records, read_files


class Run(NamedTuple):
    """What one run directory says. The dictionaries are empty if their file is missing.

    `read_runs` leaves out what is damaged: what is here has the type that it should have.
    """

    name: str
    run_dir: Path
    records: list[Record]
    config: dict[str, Any]
    environment: dict[str, Any]
    best: dict[str, Any]
    damaged: tuple[str, ...] = ()
    """What was left out, in words."""

    def latest(self, key: str) -> Any:
        """The last value recorded under `key`; None if there is none."""
        return next((r[key] for r in reversed(self.records) if r.get(key) is not None), None)

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The updates that recorded `key`, and its values as floats, NaN for null."""
        found = [(r["step"], r[key]) for r in self.records if key in r]
        steps = np.array([step for step, _ in found], int)
        return steps, np.array([value for _, value in found], float)

    def positions(self, steps: np.ndarray) -> dict[str, np.ndarray]:
        """`steps` in updates, tokens trained and hours of training, as far as they were recorded.

        Tokens and hours between two records are interpolated.
        """
        found = {"updates": steps}
        seq_len = self.config.get("data", {}).get("seq_len")
        for name, keys in (
            ("tokens", {"tokens": 1, "samples_seen": seq_len}),  # old runs have only the second
            ("hours", {"elapsed": 1 / 3600}),
        ):
            for key, unit in keys.items():
                at, values = self.curve(key)
                known = np.isfinite(values)
                # A run that began before this was recorded does not know its first part.
                if unit and known.any() and at[known][0] <= self.records[0]["step"]:
                    found[name] = np.interp(steps, at[known], values[known] * unit)
                    break
        return found


def read_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """Reads run directories. A name is the directory's; the whole path if two share it.

    Raises:
      InputError: a directory holds no records, or is named twice.
    """
    paths = [user_path(run_dir, "run_dir") for run_dir in run_dirs]
    names = [path.resolve().name for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        try:
            records, number = clean_records(read_metrics(path))
            files, damaged = read_files(path)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; name a run_dir") from None
        if not records:
            raise InputError(
                f"{path}: no run with records (no metrics.jsonl, or none in it that can be read); "
                "name the run_dir of a run that has trained"
            )
        if path.resolve() in [run.run_dir.resolve() for run in runs]:
            raise InputError(f"{path}: named twice; name each run once")
        if number:
            damaged.append(plural(number, "record"))
        name = name if names.count(name) == 1 else str(path)
        runs.append(Run(name, path, records, *files, tuple(damaged)))
    return runs
